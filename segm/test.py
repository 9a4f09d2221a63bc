"""Score a trained Segmenter on the validation images of its data set."""

import click

from segm.eval.evaluate import evaluate
from segm.eval.runs import open_evaluation
from segm.metrics import segmentation_scores
from segm.options import Command, checkpoint_argument, device_option, load_patched, max_images_option, patch_options
from segm.parallel import is_main, process_group


@click.command(cls=Command)
@checkpoint_argument
@device_option
@max_images_option
@patch_options
def main(checkpoint, device, max_images, **given):
    """Print pixel accuracy, mean accuracy and mIoU (percent) of CHECKPOINT, a file or a run directory.

    Data set, window and merging are those of the training; --patch-type pure turns merging off.
    """
    with process_group(device) as device:
        model, variant = load_patched(checkpoint, given, device)
        dataset, windows = open_evaluation(variant)
        confusion = evaluate(model, dataset, windows, device=device, n_images=max_images, progress=is_main())
        if is_main():
            scores = segmentation_scores(confusion)
            for key in ("pixel_accuracy", "mean_accuracy", "mean_iou"):
                click.echo(f"{key}: {scores[key]:.2f}")


if __name__ == "__main__":
    main()
