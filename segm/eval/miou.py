"""Score a trained Segmenter on a data set, single-scale or multi-scale, and save what it predicts."""

import click
import yaml

from segm.checkpoint import checkpoint_file
from segm.eval.evaluate import MULTISCALE, evaluate
from segm.eval.runs import open_evaluation
from segm.metrics import segmentation_scores
from segm.options import (
    Command,
    checkpoint_argument,
    dataset_argument,
    device_option,
    load_patched,
    max_images_option,
    merging_of,
    patch_options,
)
from segm.parallel import is_main, process_group
from segm.pictures import write_picture
from vis import blend, colorize


@click.command(cls=Command)
@checkpoint_argument
@dataset_argument
@click.option("--singlescale/--multiscale", default=True, show_default=True, help="Multi-scale: 0.5 to 1.75, mirrored.")
@click.option("--split", default="val", show_default=True, help="Which images.")
@click.option("--window-size", type=click.IntRange(min=1), help="Sliding window, pixels.  [default: the run's]")
@click.option("--window-stride", type=click.IntRange(min=1), help="Its stride, pixels.  [default: the run's]")
@click.option("--window-batch-size", type=click.IntRange(min=1), default=4, show_default=True, help="Windows at once.")
@click.option("--save-images", is_flag=True, help="Write label maps beside the checkpoint.")
@click.option("--blend/--no-blend", "blended", default=True, show_default=True, help="And blends with the images.")
@click.option("--frac-dataset", type=click.FloatRange(0, 1, min_open=True), default=1.0, help="First part.")
@device_option
@max_images_option
@patch_options
def main(
    checkpoint,
    dataset_name,
    singlescale,
    split,
    window_size,
    window_stride,
    window_batch_size,
    save_images,
    blended,
    frac_dataset,
    device,
    max_images,
    **given,
):
    """Score CHECKPOINT, a file or a run directory, on DATASET.

    Prints pixel accuracy, mean accuracy, mIoU and the IoU of every class (percent) and writes them to scores_ss.yml or
    scores_ms.yml beside the checkpoint; label maps (8-bit class indices) and blends go to images_ss or images_ms.
    """
    with process_group(device) as device:
        model, variant = load_patched(checkpoint, given, device)
        dataset, windows = open_evaluation(
            variant,
            dataset_name,
            split=split,
            window_size=window_size,
            window_stride=window_stride,
            window_batch_size=window_batch_size,
        )
        suffix = "ss" if singlescale else "ms"
        folder = checkpoint_file(checkpoint).parent
        save = _image_writer(folder / f"images_{suffix}", dataset.palette, blended) if save_images else None
        part = max(1, round(frac_dataset * len(dataset)))
        n_images = min(part, max_images or part)
        confusion = evaluate(
            model,
            dataset,
            windows,
            ratios=(1.0,) if singlescale else MULTISCALE,
            flip=not singlescale,
            device=device,
            n_images=n_images,
            on_image=save,
            progress=is_main(),
        )
        if is_main():
            scores = segmentation_scores(confusion)
            scores |= {"checkpoint": str(checkpoint), "split": split, "n_images": n_images, **merging_of(model)}
            scores["per_class_iou"] = dict(zip(dataset.classes, scores["per_class_iou"], strict=True))
            _report(scores, folder / f"scores_{suffix}.yml")


def _image_writer(folder, palette, blended):
    """Callback of `evaluate` that writes the label map and the blend of an image."""

    def write(sample, labels):
        labels = labels.numpy().astype("uint8")
        write_picture(folder / f"{sample.name}.png", labels)
        if blended:
            write_picture(folder / f"{sample.name}_blend.jpg", blend(sample.image, colorize(labels, palette)))

    return write


def _report(scores, file):
    for key in ("pixel_accuracy", "mean_accuracy", "mean_iou"):
        click.echo(f"{key}: {scores[key]:.2f}")
    for name, iou in scores["per_class_iou"].items():
        click.echo(f"  {name}: {iou:.2f}")
    file.write_text(yaml.safe_dump(scores, sort_keys=False))
    click.echo(f"written to {file}")


if __name__ == "__main__":
    main()
