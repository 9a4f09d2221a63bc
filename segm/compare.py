"""Compare methods on one model and a folder of photographs without labels: speed, tokens, how far the features move."""

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import Tensor, nn
from tqdm import tqdm

import patch
from patch.budget import grid_of
from patch.families.segmenter import is_segmenter
from patch.measure import untrained_methods
from patch.patching import merging_of
from segm import cli
from segm.data.dataset import Photographs
from segm.data.images import NORMALIZATION, Normalization, resize_to
from segm.errors import one_line
from segm.eval.evaluate import Views
from segm.eval.timing import environment
from segm.merging import PURE, PluginCommand, assignment_of, choose, parse
from segm.report import check_out
from segm.run import Run
from segm.storage import write_text
from vis import page

FOLLOWED = 6  # layers in the terminal, at most; the page shows all


class Words(cli.Numbers):
    """An option that takes all texts that follow it and begin with the name of a method."""

    def takes(self, text: str) -> bool:
        return text.split(" ")[0] in (PURE, *patch.METHODS)


class Loaded(NamedTuple):
    """A model in evaluation mode, and the images that it is fed.

    Attributes:
        size: (height, width), pixels.
    """

    model: nn.Module
    size: tuple[int, int]
    normalization: str | Normalization


@click.command(cls=PluginCommand)
@click.argument("name", metavar="MODEL")
@click.argument("folder", type=cli.FOLDER)
@click.option(
    "--methods",
    cls=Words,
    metavar="METHOD [METHOD ...]",
    help='Methods, each with options of its own in quotes: "graph --threshold 0.9" "tome --r 16".  '
    "[default: all that need no training]",
)
@click.option(
    "--tokens",
    type=cli.ABOVE_ZERO,
    default=0.5,
    help="Budget of methods without such options: tokens left on average, a share up to 1 or a number.",
)
@click.option("--checkpoint", type=cli.FILE, help="Weights of a model of timm, all of them.  [default: timm's]")
@click.option("--no-pretrained", is_flag=True, help="Random weights: speed and operations are right, features are not.")
@cli.batch_size_option
@click.option("--repeats", type=cli.POSITIVE, default=3, help="Number of timed passes per batch.")
@click.option("--pictures", "n_pictures", type=cli.COUNT, default=4, help="Number of photographs on the page.")
@click.option("--out", type=cli.FILE, default="compare.html", help="File of the page; all numbers go into a .json too.")
@click.option(
    "--max-images", type=cli.POSITIVE, default=16, metavar="N", help="Number of photographs, spread over the folder."
)
@cli.device_option
@click.pass_context
def main(
    ctx: click.Context,
    name: str,
    folder: Path,
    methods: Sequence[str],
    tokens: float,
    checkpoint: Path | None,
    no_pretrained: bool,
    batch_size: int,
    repeats: int,
    n_pictures: int,
    out: Path,
    max_images: int,
    device: torch.device,
) -> None:
    """Compare merging methods on MODEL and the photographs in FOLDER, which need no labels.

    MODEL is a name of timm or transformers, a run or a checkpoint. All methods are applied without training, at one
    budget, and timed interleaved. The page shows the tokens of every method side by side.
    """
    check_out(out)
    named = read_methods(methods)
    loaded = load(name, checkpoint, no_pretrained, device)
    photographs = Photographs(folder)
    views = Views(photographs, loaded.size, loaded.normalization, max_images, batch_size=batch_size, device=device)
    batches = [*tqdm(views, "photographs", unit="batch", leave=False)]
    rows = patch.benchmark(loaded.model, batches, named, tokens=tokens, repeats=repeats, progress=True)
    left_out = sorted({*untrained_methods()} - {row["method"] for row in rows}) if named is None else []
    record = {"model": name, "folder": str(folder), "n_images": sum(map(len, batches)), "size": loaded.size}
    record |= environment(device) | {"date": datetime.now().astimezone().isoformat(timespec="minutes")}
    record |= {"command": shlex.join(["python", "segm/compare.py", *ctx.meta[cli.WORDS]])}
    shown = views.indices[:: max(1, len(views.indices) // n_pictures)][:n_pictures] if n_pictures else []
    pictures = [token_pictures(loaded, photographs, index, rows, views[0].device) for index in shown]
    write_text(out, page.methods_page(record, rows, pictures))
    write_text(out.with_suffix(".json"), json.dumps(record | {"rows": rows}, indent=2, default=str))
    click.echo(cli.markdown(page.METHOD_COLUMNS, rows))
    click.echo(f"\n{movement_table(rows)}")
    if left_out:
        click.echo(f"left out, since the model or its images do not fit: {', '.join(left_out)}")
    click.echo(f"written to {out} and {out.with_suffix('.json')}")


def read_methods(texts: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]] | None:
    """ "graph --threshold 0.9" -> label -> (method, options); None where there are none.

    Raises:
        ValueError: an unknown method or option, or the same one twice.
    """
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for text in texts:
        try:
            given = parse(["--patch-type", *shlex.split(text)])
        except ValueError as error:
            raise ValueError(f"--methods {text!r}: {error}") from error
        if text in found:
            raise ValueError(f"--methods: {text} is listed twice")
        found[text] = choose(given)
    return found or None


def load(name: str, checkpoint: Path | None, random: bool, device: torch.device) -> Loaded:
    """A model by its name, unpatched: a run, a checkpoint, or a model of timm or transformers.

    Raises:
        ValueError: an unknown name, or weights that do not fit.
        ConnectionError: weights that cannot be fetched.
        FileNotFoundError: a folder or file that holds no model.
    """
    path = Path(name)
    is_library = path.is_dir() and (path / "config.json").is_file()  # as save_pretrained of transformers writes it
    is_run, is_library = path.exists() and not is_library, is_library or ("/" in name and ":" not in name)
    if (checkpoint is not None and (is_run or is_library)) or (random and is_run):
        raise ValueError(f"{name} has weights of its own: leave out --checkpoint and --no-pretrained")
    if is_run:
        run = Run.load(path, device=device, patch_type=PURE, amp=False)
        return Loaded(run.model, run.crop_size, run.normalization)
    if is_library:
        model, size, normalization = load_transformer(name, random)
    else:
        from timm.data import resolve_data_config  # here, for timm is slow to import

        model = load_timm(name, checkpoint, random)
        config = resolve_data_config(model=model)
        size, normalization = config["input_size"][1:], Normalization(tuple(config["mean"]), tuple(config["std"]))
    return Loaded(model.eval().to(device), size, normalization)


def load_timm(name: str, checkpoint: str | Path | None, random: bool) -> Any:
    """A model of timm with its weights, for as many classes as these have.

    Args:
        name: timm's, or of a hub: "hf-hub:USER/MODEL".
        checkpoint: file of weights; None: timm's own.
        random: without weights.

    Raises:
        ValueError: an unknown name or unfitting weights.
        ConnectionError: timm's weights cannot be fetched.
    """
    import timm  # here, for it is slow to import
    from timm.models import load_state_dict

    if ":" not in name and not timm.is_model(name):
        raise ValueError(
            f"{name}: no run or checkpoint is there, and timm knows no such model; give a plain ViT of timm"
        )
    try:
        if checkpoint is None:
            return timm.create_model(name, pretrained=not random)
        classes = classes_of(load_state_dict(str(checkpoint)))
        return timm.create_model(name, checkpoint_path=str(checkpoint), **classes)
    except Exception as error:  # of many kinds: a damaged file, another model's names or shapes, no network
        if checkpoint is not None:
            raise ValueError(f"{checkpoint}: no weights of {name} ({one_line(error)})") from error
        what, instead = ("settings", "a name of timm") if random else ("weights", "--checkpoint or --no-pretrained")
        raise ConnectionError(f"cannot fetch the {what} of {name}: give {instead}") from error


def classes_of(weights: Mapping[str, Tensor]) -> dict[str, int]:
    """The number of classes of weights, as `create_model` takes it; nothing where they have no head."""
    head = weights.get("head.weight")
    return {} if head is None else {"num_classes": len(head)}


def load_transformer(name: str, random: bool) -> tuple[Any, tuple[int, int], Normalization]:
    """A model of transformers, as the architecture in its settings says; the size and normalization of its images.

    Args:
        name: of a hub, "USER/MODEL", or a folder.
        random: without weights.

    Raises:
        ValueError: transformers is not installed, or has no such model.
        ConnectionError: it cannot be fetched.
    """
    try:
        import transformers
    except ImportError as error:
        raise ValueError(f"{name}: models of transformers need pip install 'g2tm[transformers]'") from error
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind = getattr(transformers, (config.architectures or [""])[0], transformers.AutoModel)
        build = kind.from_config if kind is transformers.AutoModel else kind
        model = build(config) if random else kind.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ConnectionError(
            f"cannot fetch {name} ({one_line(error)}): give a run, a folder of a model, or a name of timm with "
            "--checkpoint or --no-pretrained"
        ) from error
    try:
        seen = transformers.AutoImageProcessor.from_pretrained(name)
        normalization = Normalization(tuple(seen.image_mean), tuple(seen.image_std))
    except (OSError, ValueError):
        normalization = NORMALIZATION["vit"]
        click.echo(f"{name} does not say how its images are normalized: mean and deviation of 0.5 are taken", err=True)
    side = getattr(config, "image_size", None) or 224
    size = (side, side) if isinstance(side, int) else (int(side[0]), int(side[1]))
    return model, size, normalization


@torch.inference_mode()
def token_pictures(
    loaded: Loaded, photographs: Photographs, index: int, rows: Sequence[Mapping[str, Any]], device: torch.device
) -> tuple[str, list[page.Picture]]:
    """Name of a photograph, and pictures of it: as it is, and its tokens with every method."""
    sample, model = photographs[index], loaded.model
    photo, grid = resize_to(sample.image, loaded.size), grid_of(model, loaded.size)
    own = Views([sample], loaded.size, loaded.normalization, device=device)[0]
    side = model.patch_size if is_segmenter(model) else tuple(s // g for s, g in zip(loaded.size, grid, strict=True))
    shown = [page.picture(photo, "photograph")]
    for row in rows:
        if row["method"] == PURE:
            continue
        patch.apply(model, row["method"], **row["options"])
        merging_of(model).noted = True  # said while it was measured
        try:
            model(own)
            found = patch.reduction(model)
        finally:
            patch.remove(model)
        assert found is not None
        caption = f"{row['name']}: {found.lengths[0]} of {row['n_patches']} tokens"
        shown.append(page.token_picture(photo, assignment_of(found), grid, side, caption))
    return sample.name, shown


def movement_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Cosine similarity to the plain features in some layers, and the share of labels that stay."""
    depth = len(rows[0]["cosine"])
    layers = [*dict.fromkeys(round(depth * (i + 1) / FOLLOWED) for i in range(FOLLOWED) if depth * (i + 1) >= FOLLOWED)]
    title = f"cosine to the plain features, layers {', '.join(map(str, layers))}"
    columns = {"method": "{name}", title: "{cosines}", "same labels": "{labels}"}
    cells = [
        {
            "name": row["name"],
            "cosines": " ".join(f"{row['cosine'][layer - 1]:.3f}" for layer in layers),
            "labels": page.share(row["agreement"]),
        }
        for row in rows
    ]
    return cli.markdown(columns, cells)


if __name__ == "__main__":
    main()
