"""Speed of training with each method, and how much of it is waiting for data; on scenes drawn in memory.

python scripts/benchmark_training.py --model S --batch-size 8
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import click
import torch
from benchmark import BACKBONES, build_model
from equal_cost import options_for
from results_file import append, out_option
from torch.utils.data import DataLoader
from tqdm import tqdm

import patch
from segm.cli import Command, Listed, device_option, markdown
from segm.data import create_dataset
from segm.data.dataset import IGNORE_LABEL
from segm.data.loader import create_loader
from segm.eval.timing import environment
from segm.losses import Objective
from segm.merging import PURE, apply
from segm.model.segmenter import Segmenter, compile_blocks
from segm.optim import create_optimizer
from segm.precision import Precision

COLUMNS = {
    "method": "{method}",
    "tokens": "{tokens}",
    "images/s": "{images_per_second:.2f}",
    "ratio": "{ratio:.2f}",
    "waiting for data, %": "{data_wait:.1f}",
}


@click.command(cls=Command)
@click.option("--model", "size", type=click.Choice([*BACKBONES]), default="T", show_default=True, help="ViT size.")
@click.option("--side", type=click.IntRange(min=16), default=512, show_default=True, help="Of the crops, pixels.")
@click.option("--n-cls", type=click.IntRange(min=11), default=150, show_default=True, help="Classes of the model.")
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Images per update.")
@click.option("--methods", type=Listed(str, lambda: patch.METHODS), default="graph,algm,tome", show_default=True)
@click.option("--tokens", type=click.FloatRange(0, 1, min_open=True), default=690 / 1024, help="Share that is left.")
@click.option("--updates", type=click.IntRange(min=1), default=4, show_default=True, help="Updates before the next.")
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds of every method.")
@click.option("--num-workers", type=click.IntRange(min=0), default=2, show_default=True, help="Processes that draw.")
@click.option("--amp", is_flag=True, help="Mixed precision.")
@click.option("--compile", is_flag=True, help="Compile attention and MLPs, as train.py --compile does.")
@out_option
@device_option
def main(
    size: str,
    side: int,
    n_cls: int,
    batch_size: int,
    methods: tuple[str, ...],
    tokens: float,
    updates: int,
    rounds: int,
    num_workers: int,
    amp: bool,
    compile: bool,
    out: Path,
    device: torch.device,
) -> None:
    """Train a model without merging and with each method, interleaved, and print images/s and the share of waiting.

    Random weights; the settings of a method are those that leave about --tokens of the patch tokens at first. Medians
    over the rounds, after one that does not count.
    """
    dataset = create_dataset("shapes", "train", image_size=side, crop_size=side, length=batch_size * updates)
    loader = create_loader(dataset, batch_size, workers=num_workers, pin_memory=device.type == "cuda")
    plain = build_model(size, side, n_cls, device, None)
    images = next(iter(loader))["image"].to(device)
    trainings = {}
    for name in tqdm([PURE, *methods], desc="settings", leave=False):
        model, options = copy.deepcopy(plain), {}
        if name != PURE:
            patch.add_modules(model.encoder, name)
            options = options_for(model, name, [images], round(tokens * (side // 16) ** 2))
        trainings[name] = training(apply(model, name, options), loader, device, amp, compile)
    entries: dict[str, list[dict[str, Any]]] = {name: [] for name in trainings}
    for round_ in tqdm(range(1 + rounds), desc="rounds", leave=False):
        for name, train in trainings.items():
            entries[name].append(train(round_))
    rows = [row(name, found[1:], entries[PURE][1:]) for name, found in entries.items()]
    machine = environment(device)["device"]
    click.echo(f"{machine}, ViT-{size}, {side} x {side}, batch {batch_size}, amp {amp}, compile {compile}")
    click.echo(format_rows(rows))
    append("training", "training", rows, device, out)


def training(
    model: Segmenter, loader: DataLoader, device: torch.device, amp: bool, compile: bool
) -> Callable[[int], dict[str, Any]]:
    """A function of the epoch that trains for it and returns images/s, the share of waiting, and the tokens left."""
    if compile:
        compile_blocks(chain(model.encoder.blocks, model.decoder.blocks))
    optimizer, precision = create_optimizer(model, "sgd", 1e-5), Precision.choose(device, amp)
    method = patch.method(model) if patch.is_patched(model) else PURE
    objective = Objective(model, method_loss=None if method == PURE else partial(patch.loss, model))

    def train(epoch: int) -> dict[str, Any]:
        loader.sampler.epoch = epoch  # type: ignore[attr-defined]
        model.train()
        begin, waited, n_images, batches = time.perf_counter(), 0.0, 0, iter(loader)
        for _ in range(len(loader)):
            start = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - start
            images, labels = (batch[key].to(device, non_blocking=True) for key in ("image", "label"))
            n_labelled = (labels != IGNORE_LABEL).sum()
            with precision.autocast():
                loss, _ = objective(images, labels, lambda count=n_labelled: count)
            optimizer.zero_grad(set_to_none=True)
            precision.scaler.scale(loss).backward()
            precision.scaler.step(optimizer)
            precision.scaler.update()
            n_images += len(images)
        loss.item()  # waits for the device
        seconds = time.perf_counter() - begin
        rates = {"images_per_second": n_images / seconds, "data_wait": 100 * waited / seconds}
        return rates | {"tokens": _tokens(model)}

    return train


def _tokens(model: Segmenter) -> float | None:
    """Mean number of patch tokens in the last update; None without merging."""
    return patch.reduction(model).counts.double().mean().item() if patch.is_patched(model) else None


def row(name: str, entries: list[dict[str, Any]], pure: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds; the ratio is that within a round."""
    ratios = [mine["images_per_second"] / other["images_per_second"] for mine, other in zip(entries, pure, strict=True)]
    medians = {key: statistics.median(entry[key] for entry in entries) for key in ("images_per_second", "data_wait")}
    return {"method": name, "tokens": entries[-1]["tokens"], **medians, "ratio": statistics.median(ratios)}


def format_rows(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    return markdown(COLUMNS, [row | {"tokens": _kept(row["tokens"])} for row in rows])


def _kept(tokens: float | None) -> str:
    return "all" if tokens is None else f"{tokens:.0f}"


if __name__ == "__main__":
    main()
