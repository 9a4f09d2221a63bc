"""The automatic threshold of ALGM, from the similarities of the tokens of an unpatched model."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import patch
from segm import parallel
from segm.cli import Command, Numbers, checkpoint_argument, dataset_argument, device_option, max_images_option
from segm.config import RunConfig
from segm.data import create_dataset, spread
from segm.eval.evaluate import as_is
from segm.merging import PURE, mean_tokens, read_variant
from segm.run import Run
from segm.sizes import Size

N_VIEWS, SUSPICIOUS = 8, 0.25  # images whose tokens are counted; share of the tokens that is suspiciously few


@dataclass(frozen=True)
class Similarity:
    """Mean and population standard deviation of the pairwise cosine similarities of a layer."""

    mean: float
    std: float

    @property
    def threshold(self) -> float:
        """τ = μ + σ (ALGM, section 3.4), at most 1."""
        return min(self.mean + self.std, 1.0)


@click.command(cls=Command)
@checkpoint_argument
@dataset_argument
@click.option("--selected-layers", cls=Numbers, type=int, help="Layers to measure, counted from 1.  [default: all]")
@device_option
@max_images_option
def main(
    checkpoint: Path, dataset_name: str, selected_layers: tuple[int, ...], device: torch.device, max_images: int | None
) -> None:
    """Print mean, standard deviation and their sum, the threshold, of the similarities of the tokens of CHECKPOINT.

    Similarities are those of all pairs of patch tokens after the attention of a layer, over the training images of
    DATASET at the crop size; merging is off.
    """
    with parallel.process_group(device) as device:
        found = automatic_thresholds(checkpoint, dataset_name, list(selected_layers) or None, device, max_images)
        if parallel.is_main():
            click.echo(f"{'layer':>5} {'mean':>8} {'std':>8} {'threshold':>10}")
            for layer, similarity in found.items():
                click.echo(f"{layer:5d} {similarity.mean:8.4f} {similarity.std:8.4f} {similarity.threshold:10.4f}")


@torch.inference_mode()
def automatic_thresholds(
    checkpoint: str | Path,
    dataset_name: str | None,
    layers: Sequence[int] | None,
    device: torch.device,
    max_images: int | None = None,
    size: Size | None = None,
) -> dict[int, Similarity]:
    """Similarities of the tokens of an unpatched model over the training images, of all processes together.

    Args:
        checkpoint: file or run directory.
        dataset_name: None: that of the run.
        layers: 1-based, ascending; None: all.
        max_images: number of images, spread over all, since files are often sorted by scene; None: all.
        size: to which the images are resized, pixels; None: the crop of the run.

    Returns:
        layer -> `Similarity`.

    Raises:
        ValueError: a layer that the model lacks, or not in ascending order.
    """
    run = Run.load(checkpoint, device=device, patch_type="pure")
    encoder = run.model.encoder
    layers = layers or list(range(1, len(encoder.blocks) + 1))
    with patch.similarities(encoder, layers) as moments:
        name = dataset_name or run.dataset
        dataset = create_dataset(name, "train", normalization=run.normalization, bands=run.bands)
        mine = spread(max_images, len(dataset))[parallel.rank() :: parallel.world_size()]
        loader = DataLoader(dataset, batch_size=None, sampler=mine, collate_fn=as_is)
        for sample in tqdm(loader, desc="similarities", unit="image", leave=False, disable=not parallel.is_main()):
            encoder.forward_features(run.preprocess_resized(sample.image, size))
        zeros = torch.zeros(3, dtype=torch.float64, device="cpu" if device.type == "mps" else device)
        sums = [moments.get(layer, zeros) for layer in layers]
        total = parallel.all_reduce_sum(torch.stack(sums))
    return {layer: Similarity(*patch.mean_and_std(one)) for layer, one in zip(layers, total, strict=True)}


def threshold_for(config: RunConfig, unpatched: Path | None, device: torch.device, say: Callable[[str], None]) -> float:
    """Threshold of `--threshold auto`: mean + std of the similarities in the first layer that shall merge.

    The rule knows nothing of what it leaves: where that is little, a line says so.

    Args:
        config: of the training, whose method has a threshold.
        unpatched: checkpoint or run that the similarities are those of.
        say: called with a line about the threshold.

    Raises:
        ValueError: no run, or a method without a threshold.
    """
    method, options = read_variant(config.merging.entries)
    if unpatched is None:
        raise ValueError("--threshold auto: name an unpatched run with --from")
    if method == PURE or not patch.find(method).takes("threshold"):
        raise ValueError(f"--threshold auto: {method} has no threshold, name a method that has with --patch-type")
    if (options.get("metric", "tokens"), options.get("after", "attention")) != ("tokens", "attention"):
        raise ValueError("--threshold auto: it is that of tokens after attention; leave --metric and --merge-after out")
    layer, size = options["layers"][0], config.data.crop_size
    found = automatic_thresholds(unpatched, config.data.dataset, [layer], device, size=size)
    threshold = round(found[layer].threshold, 4)
    pure = Run.load(unpatched, device=device, patch_type=PURE)
    merged = pure.with_settings(method, options | {"threshold": threshold})
    views = [*merged.views(config.data.dataset, N_VIEWS)]
    left = mean_tokens(merged.model, views) / math.prod(merged.model.grid(views[0].shape[-2:]))
    say(f"threshold {threshold}, from layer {layer} of {unpatched}: {left:.0%} of the tokens are left")
    if left < SUSPICIOUS:
        say("warning: so few tokens lose accuracy, measure a setting with g2tm tune")
    return threshold


if __name__ == "__main__":
    main()
