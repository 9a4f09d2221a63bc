"""Classification with merged tokens: accuracy, speed, operations and tokens of a plain ViT of timm.

python scripts/eval_classification.py deit_small_patch16_224 imagenet/val --patch-type tome --merge-num 100
"""

import copy
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from timm.data import ImageDataset, ImageNetInfo, create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import patch
from g2tm.validation import check_r
from patch.families.timm_vit import grid_of
from patch.methods.common import scheduled_r
from patch.operations import count_operations
from patch.trials import interleaved_trials
from segm import parallel
from segm.cli import POSITIVE, device_option, markdown
from segm.compare import load_timm
from segm.data import spread
from segm.eval.timing import environment
from segm.merging import PURE, MergingCommand, choose
from segm.speedtest import read_methods
from segm.storage import write_picture, write_text
from vis.tokens import outline_tokens

COLUMNS = {
    "model": "{name}",
    "top-1": "{top1:.2f}",
    "top-5": "{top5:.2f}",
    "images/s": "{images_per_second:.2f}",
    "GFLOPs": "{gflops:.3f}",
    "tokens": "{tokens:.1f}",
}


class Synthetic(Dataset):
    """Noise, smooth at random, whose label is what a model says of it.

    Args:
        model: unpatched.
        count: of images.
        size: (C, H, W).
        device: of the model.
    """

    def __init__(self, model: nn.Module, count: int, size: tuple[int, int, int], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = []
        for _ in range(count):
            side = int(torch.randint(4, 33, (), generator=generator))
            coarse = torch.randn(1, size[0], side, side, generator=generator)
            self.images.append(nn.functional.interpolate(coarse, size[1:], mode="bilinear")[0])
        with torch.inference_mode():
            self.labels = [int(model(image[None].to(device)).argmax()) for image in self.images]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], self.labels[index]


def open_folder(folder: Path, model: nn.Module, transform: Any) -> Dataset:
    """The images below a folder per class. The classes are ImageNet's where all folders are named so, else they count
    in the order of their names.

    Raises:
        ValueError: there are none, or not as many as the model has classes.
    """
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    info, classes = ImageNetInfo(), int(getattr(model, "num_classes", 0))
    known = {info.index_to_label_name(index): index for index in range(info.num_classes())}
    if names and classes == len(known) and known.keys() >= set(names):
        index = {name: known[name] for name in names}
    elif names and len(names) == classes:
        index = {name: number for number, name in enumerate(names)}
    else:
        raise ValueError(
            f"{folder}: {len(names)} folders for {classes} classes: give one folder per class, or ImageNet's synsets"
        )
    try:
        return ImageDataset(str(folder), class_map=index, transform=transform)
    except RuntimeError as error:
        raise ValueError(f"{folder}: no image below its folders") from error


@torch.inference_mode()
def score(model: nn.Module, loader: DataLoader, device: torch.device) -> dict[str, float]:
    """Percent of the images whose label is the first, or among the first five, and mean number of patch tokens; over
    the images of all processes."""
    hits, tokens, n_images = torch.zeros(2), 0, 0
    for images, labels in tqdm(loader, "accuracy", unit="batch", leave=False, disable=not parallel.is_main()):
        scores = model(images.to(device))
        best = scores.topk(min(5, scores.shape[1]), dim=1).indices.cpu() == labels[:, None]
        hits += torch.tensor([best[:, 0].sum(), best.any(1).sum()])
        tokens += sum(patch.reduction(model).lengths) if patch.is_patched(model) else 0
        n_images += len(images)
    counted = torch.tensor([*hits.tolist(), tokens, n_images], dtype=torch.float64)
    first, among, tokens, n_images = parallel.all_reduce_sum(counted).tolist()
    return {"top1": 100 * first / n_images, "top5": 100 * among / n_images, "tokens": tokens / n_images}


def draw(model: nn.Module, dataset: Any, count: int, folder: Path, device: torch.device, config: dict) -> None:
    """Write the merged tokens of some images, outlined; nothing for a model that does not merge."""
    folder.mkdir(parents=True, exist_ok=True)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    for number in range(min(count, len(dataset))):
        image = dataset[number][0]
        with torch.inference_mode():
            model(image[None].to(device))
        found, grid = patch.reduction(model), grid_of(model, image.shape[-2:])
        side = image.shape[1] // grid[0], image.shape[2] // grid[1]  # of a hybrid: not that of its patch embedding
        if not hasattr(found, "assignment"):
            raise ValueError(f"{patch.method(model)} mixes all tokens: there are no groups to draw")
        pixels = ((image * std + mean).clamp(0, 1) * 255).byte().permute(1, 2, 0).numpy()
        picture = outline_tokens(np.ascontiguousarray(pixels), found.assignment[0].cpu().numpy(), grid, side)
        write_picture(folder / f"{number:05d}_{found.lengths[0]}_tokens.png", picture)


def merging_options(given: dict[str, Any], depth: int, total: int | None, inflect: float) -> tuple[str, dict]:
    """Method and options for a model of so many blocks; a total is spread over the layers."""
    method, options = choose(given)
    if total is not None and given.get("patch_type") != PURE:
        if method == PURE or not patch.find(method).takes("r"):
            raise ValueError(f"--merge-num: {method} removes no given number of tokens; name a method with --r")
        if "r" in options:
            raise ValueError("--merge-num spreads a total over the layers, --r gives each its own: choose one")
        options = options | {"r": total_schedule(total, inflect, depth)}
    return method, options


@click.command(cls=MergingCommand)
@click.argument("name", metavar="MODEL")
@click.argument("folder", required=False, type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--checkpoint", type=click.Path(exists=True, dir_okay=False), help="Weights of all of the model.")
@click.option("--no-pretrained", is_flag=True, help="Random weights instead of timm's.")
@click.option("--synthetic", type=POSITIVE, metavar="N", help="N images of noise, scored by what the plain model says.")
@click.option("--compare", help='Several methods in one table, as in "tome,pitome,tofu --variant paper".')
@click.option(
    "--merge-num", type=click.IntRange(min=0), help="Tokens that all layers together remove, with each method."
)
@click.option("--inflect", type=click.FloatRange(-1, 1), default=-0.5, show_default=True, help="Of --merge-num.")
@click.option("--batch-size", type=POSITIVE, default=16, show_default=True)
@click.option("--max-images", type=POSITIVE, help="Use so many images, spread over the data set.")
@click.option("--num-workers", type=click.IntRange(min=0), default=2, show_default=True)
@click.option("--pictures", type=click.Path(path_type=Path), help="Folder for pictures of the merged tokens.")
@click.option("--n-pictures", type=POSITIVE, default=8, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file for the results.")
@device_option
def main(
    name: str,
    folder: Path | None,
    checkpoint: str | None,
    no_pretrained: bool,
    synthetic: int | None,
    compare: str | None,
    merge_num: int | None,
    inflect: float,
    batch_size: int,
    max_images: int | None,
    num_workers: int,
    pictures: Path | None,
    n_pictures: int,
    out: Path | None,
    device: torch.device,
    merging: dict[str, Any],
) -> None:
    """Accuracy and speed of MODEL, a plain ViT of timm, on FOLDER, which holds one folder of images per class.

    The plain model and the merged ones are timed interleaved. `torchrun` shares the images between processes.
    """
    if (folder is None) == (synthetic is None):
        raise ValueError("give a FOLDER of images or --synthetic N")
    with parallel.process_group(device) as device:
        plain = load_timm(name, checkpoint, no_pretrained).eval().to(device)
        config = resolve_data_config(model=plain)
        if synthetic is not None:
            dataset: Any = Synthetic(plain, synthetic, config["input_size"], device)
        else:
            assert folder is not None
            dataset = open_folder(folder, plain, create_transform(**config, is_training=False))
        spread_out = partial(merging_options, depth=len(plain.blocks), total=merge_num, inflect=inflect)
        methods = read_methods(compare, merging, spread_out)
        models = {PURE: plain}
        for label, (method, options) in methods.items():
            if method != PURE:
                models[label] = patch.apply(copy.deepcopy(plain), method, **options)
        indices = spread(max_images, len(dataset))
        if parallel.world_size() > len(indices):
            raise ValueError(f"{parallel.world_size()} processes for {len(indices)} images: start fewer")
        mine = torch.utils.data.Subset(dataset, indices[parallel.rank() :: parallel.world_size()])
        loader = DataLoader(mine, batch_size, num_workers=0 if synthetic else num_workers)
        rows = measure(models, loader, device)
        if not parallel.is_main():
            return
        chosen = {label: {"method": method, **options} for label, (method, options) in methods.items()}
        write(rows, name, chosen if compare else next(iter(chosen.values())), out, device)
        for label, model in models.items() if pictures is not None else ():
            if patch.is_patched(model):
                own = pictures / label.replace(" ", "_") if compare else pictures
                draw(model, dataset, n_pictures, own, device, config)
                click.echo(f"pictures in {own}")


def measure(models: dict[str, nn.Module], loader: DataLoader, device: torch.device) -> list[dict[str, Any]]:
    """A row per model: scores; then, in the main process, speed of all of them on its first batch, interleaved, and
    operations."""
    rows = [{"name": name, **score(model, loader, device)} for name, model in models.items()]
    if not parallel.is_main():  # the others have ended, and leave the machine to the timing
        return rows
    batch = next(iter(loader))[0].to(device)
    trials = interleaved_trials(models, [batch], device, repeats=5)
    for row, (name, model) in zip(rows, models.items(), strict=True):
        if not patch.is_patched(model):
            row["tokens"] = float(np.prod(model.patch_embed.grid_size))
        rates = trials[name].flatten()
        row |= {"images_per_second": rates.median().item(), "gflops": count_operations(model, batch[:4]).total}
    return rows


def write(
    rows: Sequence[dict[str, Any]], name: str, merging: dict[str, Any], out: Path | None, device: torch.device
) -> None:
    """Print the table, and write all of it as JSON."""
    click.echo(markdown(COLUMNS, rows))
    if out is not None:
        content = {"model": name, "merging": merging, "rows": rows, "environment": environment(device)}
        write_text(out, json.dumps(content, indent=2) + "\n")


def total_schedule(total: int, inflection: float, depth: int) -> list[int]:
    """Tokens that every layer removes so that all layers together remove `total` (OpenToMe's schedules).

    Each layer removes total / depth, inflected as in `scheduled_r`. The rest of the division goes to the first layer
    where the inflection is below 0, else to the last.

    Raises:
        ValueError: a negative total, or an inflection outside of -1 to 1.
    """
    check_r(total)
    if not -1 <= inflection <= 1:
        raise ValueError(f"inflection {inflection}: give a number from -1 to 1")
    schedule = [max(scheduled_r(total // depth, inflection, layer, depth), 0) for layer in range(1, depth + 1)]
    schedule[0 if inflection < 0 else -1] += total - sum(schedule)
    return schedule


if __name__ == "__main__":
    main()
