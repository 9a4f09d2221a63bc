"""Take a Segmenter's weights from mmsegmentation to a run directory of ours, and back.

python scripts/convert_checkpoint.py segmenter_vit-s_mask.pth runs/from_mmseg --dataset ade20k
python scripts/convert_checkpoint.py runs/graph graph_for_mmseg.pth
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from segm.checkpoint import LAST, load_checkpoint, save_checkpoint
from segm.cli import POSITIVE, Command
from segm.config import RunConfig, variant_file
from segm.data import DATASETS, class_info, dataset_defaults
from segm.merging import build_model

BACKBONE = "vit_base_patch16_224"  # of timm; its norms have mmsegmentation's epsilon, its sizes are all given
BLOCK = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.qkv.weight": "attn.attn.in_proj_weight",
    "attn.qkv.bias": "attn.attn.in_proj_bias",
    "attn.proj": "attn.attn.out_proj",
    "mlp.fc1": "ffn.layers.0.0",
    "mlp.fc2": "ffn.layers.1",
}
PARTS = {
    "encoder.patch_embed.proj": "backbone.patch_embed.projection",
    "encoder.cls_token": "backbone.cls_token",
    "encoder.pos_embed": "backbone.pos_embed",
    "encoder.norm": "backbone.ln1",
    "encoder.blocks": "backbone.layers",
    "encoder.clusterer": "backbone.clusterer",  # of ClustViT, as the next
    "encoder.expand_mlp": "backbone.expand_mlp",
    "decoder.proj_dec": "decode_head.dec_proj",
    "decoder.proj_patch": "decode_head.patch_proj.weight",
    "decoder.proj_classes": "decode_head.classes_proj.weight",
    "decoder.cls_emb": "decode_head.cls_emb",
    "decoder.decoder_norm": "decode_head.decoder_norm",
    "decoder.mask_norm": "decode_head.mask_norm",
    "decoder.blocks": "decode_head.layers",
}
TRANSPOSED = ("proj_patch", "proj_classes")  # ours multiply from the right


@click.command(cls=Command)
@click.argument("source", type=click.Path(exists=True, path_type=Path))
@click.argument("target", type=click.Path(path_type=Path))
@click.option("--dataset", "dataset_name", type=click.Choice(DATASETS), help="Of a model from mmsegmentation.")
@click.option("--n-heads", type=POSITIVE, help="Attention heads, which no weight tells.  [default: width / 64]")
@click.option(
    "--injection-point",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Of a ClustViT: no weight tells.",
)
@click.option("--normalization", type=click.Choice(["vit", "deit"]), default="vit", show_default=True, help="Pixels.")
def main(
    source: Path,
    target: Path,
    dataset_name: str | None,
    n_heads: int | None,
    injection_point: int,
    normalization: str,
) -> None:
    """Convert SOURCE, a checkpoint of mmsegmentation's Segmenter with a mask transformer, to the run directory TARGET;
    or SOURCE, a run of ours, to the checkpoint TARGET. Both give the same logits for images of the size of training.
    Released checkpoints of ClustViT are of the first kind.
    """
    if target.exists():
        raise ValueError(f"{target} is there already: choose another name")
    if source.is_dir() or variant_exists(source):
        weights = from_ours(load_checkpoint(source)["model"])
        names = [*(RunConfig.read(source).class_names or ())]
        target.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"state_dict": weights, "meta": {"dataset_meta": {"classes": names}}}, target)
    else:
        if dataset_name is None:
            raise ValueError("name the data set that the model was trained on with --dataset")
        found = load_theirs(source)
        write_run(found.get("state_dict", found), target, dataset_name, n_heads, normalization, injection_point)
    click.echo(f"written to {target}")


def load_theirs(source: Path) -> dict[str, Any]:
    """A checkpoint of mmengine; nothing in it is executed.

    Raises:
        ValueError: no checkpoint, or one that holds other objects than tensors.
    """
    try:
        found = torch.load(source, map_location="cpu", weights_only=True)
    except Exception as error:  # what a pickle can hold fails in all ways
        raise ValueError(
            f"{source} holds no weights alone: load it where you trust it, and save its state_dict"
        ) from error
    if not isinstance(found, dict):
        raise ValueError(f"{source} holds a {type(found).__name__}, not a state_dict")
    return found


def variant_exists(checkpoint: Path) -> bool:
    """Return whether a checkpoint is one of ours."""
    try:
        return variant_file(checkpoint).is_file()
    except FileNotFoundError:
        return False


def names_of(ours: str) -> str | None:
    """mmsegmentation's name of a weight of ours; None: it has none, as the unused head of the encoder."""
    part = next((part for part in PARTS if ours == part or ours.startswith(f"{part}.")), None)
    if part is None:
        return None
    rest = ours.removeprefix(part)
    if part.endswith("blocks"):
        match = re.fullmatch(r"\.(\d+)\.(.+)", rest)
        assert match is not None
        inner = next(name for name in BLOCK if match[2].startswith(name))
        rest = f".{match[1]}.{BLOCK[inner]}{match[2].removeprefix(inner)}"
    return PARTS[part] + rest


def from_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a Segmenter of ours under mmsegmentation's names.

    Raises:
        ValueError: another decoder than the mask transformer, or parts that a plain ViT lacks.
    """
    found = {names_of(name): turned(name, values) for name, values in weights.items()}
    if "decode_head.cls_emb" not in found:
        raise ValueError("mmsegmentation's Segmenter has a mask transformer: this model has another decoder")
    unknown = [name for name in weights if names_of(name) is None and not name.startswith("encoder.head")]
    if unknown:
        raise ValueError(f"mmsegmentation's ViT has no {unknown[0]}: this model cannot be converted")
    return {name: values for name, values in found.items() if name is not None}


def turned(name: str, values: Tensor) -> Tensor:
    """A weight as the other side multiplies it."""
    return values.T.contiguous() if name.endswith(TRANSPOSED) else values


def write_run(
    weights: Mapping[str, Tensor],
    target: Path,
    dataset_name: str,
    n_heads: int | None,
    normalization: str,
    injection_point: int,
) -> None:
    """Write a run directory with the weights of mmsegmentation's Segmenter.

    Raises:
        ValueError: other weights than those of a ViT with a mask transformer.
    """
    try:
        net = net_kwargs(weights, n_heads, normalization)
    except KeyError as error:
        raise ValueError(f"no Segmenter with a mask transformer of mmsegmentation: {error} is missing") from error
    model = build_model(net)
    own = model.state_dict()
    bias = names_of("encoder.patch_embed.proj.bias")
    if bias is not None and bias not in weights:  # mmsegmentation's has none by default
        weights = {**weights, bias: torch.zeros(net["d_model"])}
    missing = [theirs for name in own if (theirs := names_of(name)) is not None and theirs not in weights]
    if missing:
        raise ValueError(f"no Segmenter with a mask transformer of mmsegmentation: {missing[0]} is missing")
    for name in own:
        theirs = names_of(name)
        if theirs is not None:
            own[name] = turned(name, weights[theirs])
    model.load_state_dict(own)
    names, palette = class_info(dataset_name) if dataset_name != "folder" else ((), ())
    defaults, side = dataset_defaults(dataset_name), net["image_size"][0]
    data: dict[str, Any] = {"dataset": dataset_name, "image_size": defaults["im_size"], "crop_size": side}
    clusters = {
        "patch_type": "clustvit",
        "selected_layer": injection_point,
        "clusters": net.get("reduction", {}).get("clusters"),
    }
    data |= {"normalization": normalization} | (clusters if "reduction" in net else {"patch_type": "pure"})
    if len(names) == net["n_cls"]:
        named = enumerate(zip(names, palette, strict=True))
        data["classes"] = [{"id": i, "name": name, "color": [int(c) for c in color]} for i, (name, color) in named]
    inference = {
        "im_size": defaults["im_size"],
        "window_size": side,
        "window_stride": min(side, defaults["window_stride"]),
    }
    target.mkdir(parents=True)
    variant = {"net_kwargs": net, "dataset_kwargs": data, "inference_kwargs": inference}
    RunConfig.from_variant(variant).write(target)
    save_checkpoint({"model": model.state_dict(), "epoch": 0}, target / LAST)


def net_kwargs(weights: Mapping[str, Tensor], n_heads: int | None, normalization: str) -> dict[str, Any]:
    """Settings of the network that follow from the weights."""
    width, _, patch, _ = weights["backbone.patch_embed.projection.weight"].shape
    side = math.isqrt(weights["backbone.pos_embed"].shape[1] - 1) * patch
    n_cls = weights["decode_head.cls_emb"].shape[1]
    depth = {
        part: len({name.split(".")[2] for name in weights if name.startswith(f"{part}.layers.")})
        for part in ("backbone", "decode_head")
    }
    decoder = {"name": "mask_transformer", "n_cls": n_cls, "n_layers": depth["decode_head"], "dropout": 0.0}
    sizes = {"image_size": [side, side], "patch_size": patch, "d_model": width, "n_layers": depth["backbone"]}
    sizes |= {"n_heads": n_heads or max(1, width // 64), "n_cls": n_cls, "normalization": normalization}
    found = {"backbone": BACKBONE, "decoder": decoder, "distilled": False, **sizes}
    if "backbone.clusterer.net.0.weight" in weights:
        clusters, hidden = (
            len(weights["backbone.clusterer.net.2.bias"]) - 1,
            len(weights["backbone.clusterer.net.0.bias"]),
        )
        found["reduction"] = {"name": "clustvit", "clusters": clusters, "cluster_width": hidden}
    return found


if __name__ == "__main__":
    main()
