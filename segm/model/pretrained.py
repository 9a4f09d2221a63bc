"""Encoder weights from files of other projects: timm, DINO, DINOv2, DINOv3, MAE, iBOT, transformers, own runs.

A file is brought to timm's names in three steps: its tensors are found at any depth, their names are changed, and the
position embedding is resized. One line names the tensors that the encoder has no use for.
"""

import hashlib
import logging
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models._manipulate import adapt_input_conv
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_names
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segm.checkpoint import load_safetensors, load_tensors
from segm.config import recorded_grid
from segm.errors import one_line
from segm.model.encoder import ALIASES, position_prefix, resize_position_embedding

logger = logging.getLogger(__name__)

# The patch embedding tells where in a file an encoder is.
PATCH_EMBEDDINGS = (
    "patch_embed.proj.weight",
    "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embeddings.weight",
    "embeddings.patch_embedding.weight",
)
# Of several encoders in a file the first of these, as their papers evaluate them; then the one nearest to the top.
AVERAGED = ("teacher", "ema", "target")
# From the names of other projects to timm's, in this order.
RENAMES = (
    (r"^embeddings\.(cls_token|mask_token)$", r"\1"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^(embeddings\.register_tokens|register_tokens|storage_tokens)$", "reg_token"),
    (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
    (r"^embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
    (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 in chunks for FSDP
    (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
    (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
    (r"\.(?:attention\.attention|attn)\.([qkv])(?:uery|ey|alue)\.", r".attn.\1."),
    (r"\.(?:attention|self_attn)\.([qkv])_proj\.", r".attn.\1."),
    (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.(?:intermediate\.dense|mlp\.w12|mlp\.weights_in)\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.(?:w3|weights_out|down_proj)\.", ".mlp.fc2."),
    (r"^(?:layernorm|post_layernorm)\.", "norm."),
)


def load_pretrained(encoder: VisionTransformer | Eva, backbone: str, source: bool | str | Path) -> None:
    """Copy pretrained weights into an encoder; the position embedding is resized to its grid.

    Args:
        encoder: from `segm.model.encoder.create_encoder`.
        backbone: its name.
        source: True: the weights that timm has for the name. A path: the weights in that file (.pth, .safetensors, or
            the .npz of the AugReg release).

    Raises:
        ValueError: weights that do not fit, or a damaged file.
        FileNotFoundError: no such file.
        ConnectionError: timm's weights cannot be fetched.
    """
    name = ALIASES.get(backbone, backbone)
    try:
        with torch.device("meta"):
            blank = timm.create_model(name)
        heads = {blank.blocks[0].attn.num_heads, encoder.blocks[0].attn.num_heads}
        if len(heads) > 1:  # no weight says how many there are
            raise RuntimeError(f"heads: {heads}")
        if source is not True and Path(source).suffix != ".npz":
            load_encoder(encoder, Path(source), backbone)
            return
        donor = _fetched(name) if source is True else _read_npz(name, Path(source), blank)
        weights = donor.state_dict()
        if "pos_embed" in weights and encoder.pos_embed is not None:
            weights["pos_embed"] = resize_position_embedding(
                weights["pos_embed"], donor.patch_embed.grid_size, encoder.patch_embed.grid_size, position_prefix(donor)
            )
        fit_bands(encoder, weights)
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"pretrained weights of {backbone} do not fit the requested width, depth, heads or patch size "
            f"({one_line(error)}): use --no-pretrained"
        ) from error


def _fetched(name: str) -> VisionTransformer | Eva:
    """timm's own model of that name, with its weights."""
    try:
        return timm.create_model(name, pretrained=True)
    except Exception as error:  # the hub client raises many unrelated types when it cannot connect
        raise ConnectionError(
            f"cannot fetch timm's weights for {name} ({one_line(error)}): "
            "use --pretrained FILE for weights on disk, or --no-pretrained"
        ) from error


def _read_npz(name: str, path: Path, blank: VisionTransformer | Eva) -> VisionTransformer | Eva:
    """timm's own model of that name, with AugReg's weights and their grid, to which timm would not resize them."""
    if not path.is_file():
        raise FileNotFoundError(f"pretrained weights {path} not found")
    overlay = {"file": str(path), "custom_load": True}
    size = blank.patch_embed.img_size
    try:
        with np.load(path) as weights:
            for key in weights:
                if key.endswith("posembed_input/pos_embedding"):
                    side = math.isqrt(weights[key].shape[1] - position_prefix(blank))
                    size = tuple(side * pixels for pixels in blank.patch_embed.patch_size)
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=size)
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise ValueError(f"cannot read {path} as weights of {name}: {one_line(error)}") from error


def load_encoder(encoder: nn.Module, file: Path, backbone: str) -> None:
    """Copy the weights in a .pth or .safetensors into an encoder, under any of the known names; backbone: its name.

    Raises:
        ValueError: a damaged file, one without a plain ViT in it, or one that does not fit.
    """
    tensors = read_weights(file)
    weights, unused = find_encoder(tensors, file)
    own = encoder.state_dict()
    try:
        weights = in_names_of(encoder, weights, file)
        n_blocks = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
        if n_blocks > len(encoder.blocks):
            raise ValueError(f"it has {n_blocks} blocks")
        fit_bands(encoder, weights)
        _refuse_lost_biases(weights, own)
        head = own.get("head.weight")
        if head is not None and weights.get("head.weight", head).shape != head.shape:
            own = {name: value for name, value in own.items() if not name.startswith("head.")}
        others = [name for name in weights if name not in own]
        weights = {name: value for name, value in weights.items() if name in own}
        heads = {name for name in own if name.split(".")[0] in ("head", "head_dist", "fc_norm", "attn_pool")}
        missing = sorted(own.keys() - weights.keys() - heads)
        if missing:
            raise ValueError(f"it lacks {summary(missing)}")
        encoder.load_state_dict(weights, strict=False)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"{file} does not fit the requested width, depth, heads or patch size of {backbone} "
            f"({one_line(error)}): choose its backbone, or use --no-pretrained"
        ) from error
    if unused or others:
        logger.warning("%s: the encoder has no use for %s", file, summary([*unused, *others]))


def fit_bands(encoder: nn.Module, weights: dict[str, Tensor], prefix: str = "") -> None:
    """Fit the patch embedding for RGB among an encoder's weights to its number of bands, in place, as timm does it:
    channels are repeated and scaled, or summed up for one band. prefix: of the names of the weights."""
    name, n_bands = f"{prefix}patch_embed.proj.weight", encoder.patch_embed.proj.in_channels
    if name in weights and weights[name].shape[1:2] == (3,):
        weights[name] = adapt_input_conv(n_bands, weights[name])


def read_weights(file: Path) -> dict[str, Tensor]:
    """All tensors in a file, on the CPU; in nested dicts by names joined with dots. Executes nothing.

    A checksum is verified: inside the .pth, or in `FILE.sha256` beside it, as `sha256sum` writes it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, no weights in it, or numbers that are not finite.
    """
    if not file.is_file():
        raise FileNotFoundError(f"pretrained weights {file} not found")
    _check_sum(file)
    tensors = load_safetensors(file) if file.suffix == ".safetensors" else dict(_flat(load_tensors(file)))
    broken = [name for name, value in tensors.items() if value.is_floating_point() and not value.isfinite().all()]
    if broken:
        raise ValueError(f"{file} is damaged: {summary(broken)} holds numbers that are not finite")
    return tensors


def _check_sum(file: Path) -> None:
    beside = file.with_name(file.name + ".sha256")
    if not beside.is_file():
        return
    expected = beside.read_text(encoding="utf-8", errors="replace").split()[:1]
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if expected != [found]:
        raise ValueError(
            f"{file} is damaged: its SHA-256 is {found}, {beside.name} says {' '.join(expected) or 'nothing'}"
        )


def _flat(value: Any, name: str = "", depth: int = 4) -> Iterator[tuple[str, Tensor]]:
    """Tensors of nested dicts with the names that lead to them."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping) and depth:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else str(key), depth - 1)


def find_encoder(tensors: Mapping[str, Tensor], file: Path) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of one encoder, names below its prefix, and the names of all others.

    Raises:
        ValueError: there is no plain ViT.
    """
    found = [name.removesuffix(end) for name in tensors for end in PATCH_EMBEDDINGS if f".{name}".endswith(f".{end}")]
    if not found:
        raise ValueError(
            f"{file} holds no plain ViT that is known here: it has no {' or '.join(PATCH_EMBEDDINGS[:2])}, "
            f"but {summary(list(tensors)) or 'no tensors'}"
        )

    prefix = min(found, key=lambda prefix: (not any(word in prefix for word in AVERAGED), len(prefix)))
    weights = {name[len(prefix) :]: value for name, value in tensors.items() if name.startswith(prefix)}
    return weights, [name for name in tensors if not name.startswith(prefix)]


def in_names_of(encoder: nn.Module, weights: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """Weights in a file under the encoder's names, position embedding and fused parts included; others keep theirs.

    Raises:
        ValueError: a position embedding of a grid that is not known, and not square.
    """
    own = encoder.state_dict()
    renamed = {timm_name(name): value.float() for name, value in weights.items()}
    renamed = _joined(renamed, ("q", "k", "v"), "attn", "qkv")
    swaps = {".mlp.gate_proj.": ".mlp.fc1_g.", ".mlp.up_proj.": ".mlp.fc1_x."}
    if not any(".mlp.fc1_g." in name for name in own):
        renamed = _joined(renamed, ("gate_proj", "up_proj"), "mlp", "fc1")
        swaps = {".mlp.up_proj.": ".mlp.fc1."}
    for old, new in swaps.items():
        renamed = {name.replace(old, new): value for name, value in renamed.items()}
    for token in ("cls_token", "dist_token", "reg_token"):
        if token in renamed and token in own and renamed[token].numel() == own[token].numel():
            renamed[token] = renamed[token].view_as(own[token])
        elif token in renamed and not renamed[token].numel():
            del renamed[token]
    if "pos_embed" in renamed and encoder.pos_embed is not None:  # a run knows the grid that it has
        _fit_position(renamed, encoder, recorded_grid(file, renamed["patch_embed.proj.weight"].shape[2:]))
    if isinstance(encoder, Eva):
        renamed = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", name): value for name, value in renamed.items()}
        renamed = eva_names(renamed, encoder)
    return renamed


def timm_name(name: str) -> str:
    """timm's word for a tensor."""
    for old, new in RENAMES:
        name = re.sub(old, new, name)
    return name


def _joined(weights: Mapping[str, Tensor], parts: tuple[str, ...], module: str, whole: str) -> dict[str, Tensor]:
    """Fuse layers that timm computes as one; a bias that one of them lacks is 0."""
    kept = dict(weights)
    places = {name.rsplit(".", 2)[0] for name in weights if re.search(rf"\.{module}\.{parts[0]}\.weight$", name)}
    for place in places:
        rows = [kept.pop(f"{place}.{part}.weight", None) for part in parts]
        if any(row is None for row in rows):
            raise ValueError(f"{place} has not all of {', '.join(parts)}")
        biases = [kept.pop(f"{place}.{part}.bias", None) for part in parts]
        kept[f"{place}.{whole}.weight"] = torch.cat(rows)
        if any(bias is not None for bias in biases):
            lengths = [len(row) for row in rows]
            biases = [torch.zeros(n) if bias is None else bias for n, bias in zip(lengths, biases, strict=True)]
            kept[f"{place}.{whole}.bias"] = torch.cat(biases)
    return kept


def _fit_position(weights: dict[str, Tensor], encoder: nn.Module, recorded: tuple[int, int] | None) -> None:
    """Bring `pos_embed` to the encoder's grid, from that which its run recorded, else the encoder's, else a square."""
    embedding = weights["pos_embed"]
    embedding = embedding.unsqueeze(0) if embedding.ndim == 2 else embedding
    prefix, grid = position_prefix(encoder), encoder.patch_embed.grid_size
    count = embedding.shape[1]
    for in_front in (prefix, 1, 0):
        side = math.isqrt(max(count - in_front, 1))
        fitting = [one for one in (recorded, grid, (side, side)) if one and math.prod(one) == count - in_front]
        if fitting:
            old_grid = fitting[0]
            break
    else:
        raise ValueError(f"its position embedding has {count} tokens, which are no square grid")
    if in_front > prefix and "cls_token" in weights:  # DINOv2 with registers: CLS takes its own along
        weights["cls_token"] = weights["cls_token"] + embedding[:, :1]
        embedding, in_front = embedding[:, 1:], 0
    if in_front != prefix:
        raise ValueError(f"its position embedding counts {in_front} prefix tokens, that of the encoder {prefix}")
    weights["pos_embed"] = resize_position_embedding(embedding, old_grid, grid, prefix)


def _refuse_lost_biases(weights: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> None:
    """A bias that the encoder has no place for would change what it computes."""
    lost = [
        name
        for name, value in weights.items()
        if name.startswith("blocks.") and name not in own and name.endswith(".bias") and value.any()
    ]
    if lost:
        raise ValueError(f"it has {summary(lost)}, for which this backbone has no place")


def summary(names: list[str]) -> str:
    """Names in a few words: those of one kind together, at most eight kinds."""
    kinds = Counter(re.sub(r"\d+", "*", name) for name in names)
    if len(kinds) > 8:
        kinds = Counter(name.split(".")[0] + (".*" if "." in name else "") for name in names)
    shown = [name if count == 1 else f"{name} ({count})" for name, count in kinds.most_common(8)]
    return ", ".join([*shown, *(["..."] if len(kinds) > 8 else [])])
