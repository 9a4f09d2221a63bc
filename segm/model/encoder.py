"""The encoder: timm's plain ViTs, with the position embedding of the released Segmenter.

Everything but the resizing of the position embedding is timm's.
"""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from segm.config import load_config
from segm.errors import one_line
from segm.model.position import position_prefix, resize_position_embedding
from segm.model.pretrained import load_encoder

# The backbones of the released checkpoints. They were trained with PyTorch's LayerNorm default (eps 1e-5),
# not with timm's 1e-6; every other timm name keeps timm's value.
RELEASED = tuple(load_config("backbones"))
# Released names that timm does not know, and the timm model whose definition and weights they use.
ALIASES = {"vit_base_patch8_384": "vit_base_patch8_224"}


def _pos_embed(self: VisionTransformer, x: Tensor) -> Tensor:
    """Add prefix tokens and position embedding; x: (B, gh, gw, D) -> (B, P + gh·gw, D).

    timm's own resizes the embedding bicubically, with antialiasing.
    """
    tokens = (self.cls_token, getattr(self, "dist_token", None), self.reg_token)
    prefix = [token.expand(x.shape[0], -1, -1) for token in tokens if token is not None]
    grid, x = x.shape[1:3], x.flatten(1, 2)
    if self.pos_embed is None:
        return self.pos_drop(torch.cat([*prefix, x], dim=1))
    embedded_prefix = position_prefix(self)
    position = resize_position_embedding(self.pos_embed, self.patch_embed.grid_size, grid, embedded_prefix)
    if embedded_prefix == 0:
        return self.pos_drop(torch.cat([*prefix, x + position], dim=1))
    return self.pos_drop(torch.cat([*prefix, x], dim=1) + position)


class Encoder(VisionTransformer):
    """timm's VisionTransformer for any image size."""

    _pos_embed = _pos_embed


class DistilledEncoder(VisionTransformerDistilled):
    """timm's VisionTransformerDistilled (DeiT) for any image size."""

    _pos_embed = _pos_embed


# Rotary models keep timm's own position embedding.
_ENCODERS = {VisionTransformer: Encoder, VisionTransformerDistilled: DistilledEncoder, Eva: Eva}


def create_encoder(net_kwargs: Mapping[str, Any], pretrained: bool | str | Path = False) -> VisionTransformer | Eva:
    """Build the encoder of a Segmenter.

    Args:
        net_kwargs: `backbone` (a timm name), and optionally `image_size`, `patch_size`, `d_model`, `n_heads`,
            `n_layers`, `dropout`, `drop_path_rate`, `distilled`; what is given wins over the name's value.
        pretrained: False: random weights. True: the weights that timm has for the name. A path: the weights
            in that file (.pth or .safetensors, see `segm.model.pretrained`; or the .npz of the AugReg release).

    Raises:
        ValueError: unknown or unsupported backbone, or weights that do not fit.
        FileNotFoundError: `pretrained` names a file that is not there.
        ConnectionError: timm's weights cannot be fetched.
    """
    backbone = net_kwargs["backbone"]
    encoder = _create(backbone, **_overrides(net_kwargs))
    if net_kwargs.get("distilled") and not isinstance(encoder, DistilledEncoder):
        raise ValueError(f"backbone {backbone} has no distillation token: set distilled to false")
    if pretrained:
        _load_pretrained(encoder, backbone, pretrained)
    _freeze_unused(encoder)
    return encoder


def _overrides(net_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What net_kwargs say about the architecture, in timm's words."""
    names = {"patch_size": "patch_size", "d_model": "embed_dim", "n_layers": "depth", "n_heads": "num_heads"}
    overrides = {timm_name: net_kwargs[name] for name, timm_name in names.items() if net_kwargs.get(name)}
    size = net_kwargs.get("image_size")
    if size:
        overrides["img_size"] = (size, size) if isinstance(size, int) else tuple(size)
    dropout = net_kwargs.get("dropout") or 0.0
    overrides |= {f"{kind}_drop_rate": dropout for kind in ("pos", "proj", "attn")}
    return overrides | {"drop_path_rate": net_kwargs.get("drop_path_rate") or 0.0}


def _create(backbone: str, **overrides: Any) -> VisionTransformer | Eva:
    if backbone in RELEASED:
        overrides["norm_layer"] = partial(nn.LayerNorm, eps=1e-5)
        if backbone in ALIASES:
            overrides.setdefault("img_size", (384, 384))
    name = ALIASES.get(backbone, backbone)
    if not timm.is_model(name):
        raise ValueError(f"unknown backbone {backbone!r}: use a released name ({', '.join(RELEASED)}) or a ViT of timm")
    try:
        model = timm.create_model(name, pretrained=False, dynamic_img_size=True, **overrides)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"timm cannot build {backbone} with {overrides}: {one_line(error)}") from error
    if type(model) not in _ENCODERS:
        kind = type(model).__name__
        raise ValueError(f"{backbone} is a {kind}, not a plain ViT: choose a VisionTransformer or Eva of timm")
    # timm's registry has no place for another class; the subclasses only override one method.
    model.__class__ = _ENCODERS[type(model)]
    return model


def _load_pretrained(encoder: VisionTransformer | Eva, backbone: str, source: bool | str | Path) -> None:
    """Copy pretrained weights into the encoder; the position embedding is resized to its grid."""
    name = ALIASES.get(backbone, backbone)
    try:
        with torch.device("meta"):
            heads = {timm.create_model(name).blocks[0].attn.num_heads, encoder.blocks[0].attn.num_heads}
        if len(heads) > 1:  # no weight says how many there are
            raise RuntimeError(f"heads: {heads}")
        if source is not True and Path(source).suffix != ".npz":
            load_encoder(encoder, Path(source), backbone)
            return
        donor = _pretrained_donor(name, source)
        weights = donor.state_dict()
        if "pos_embed" in weights and encoder.pos_embed is not None:
            weights["pos_embed"] = resize_position_embedding(
                weights["pos_embed"], donor.patch_embed.grid_size, encoder.patch_embed.grid_size, position_prefix(donor)
            )
        encoder.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise ValueError(
            f"pretrained weights of {backbone} do not fit the requested width, depth, heads or patch size "
            f"({one_line(error)}): use --no-pretrained"
        ) from error


def _pretrained_donor(name: str, source: bool | str | Path) -> VisionTransformer | Eva:
    """timm's own model of that name, with its weights, or those of AugReg's .npz, and the grid that they have."""
    if source is True:
        try:
            return timm.create_model(name, pretrained=True)
        except Exception as error:  # the hub client raises many unrelated types when it cannot connect
            raise ConnectionError(
                f"cannot fetch timm's weights for {name} ({one_line(error)}): "
                "use --pretrained FILE for weights on disk, or --no-pretrained"
            ) from error
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(f"pretrained weights {path} not found")
    overlay = {"file": str(path), "custom_load": True}
    try:
        with torch.device("meta"):
            blank = timm.create_model(name)
        return timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, img_size=_image_size_of(path, blank)
        )
    except Exception as error:  # a damaged file raises whatever its reader raises
        raise ValueError(f"cannot read {path} as weights of {name}: {one_line(error)}") from error


def _image_size_of(path: Path, model: VisionTransformer | Eva) -> tuple[int, ...]:
    """Image side that the weights in an .npz were trained at: timm would resize their position embedding otherwise."""
    with np.load(path) as weights:
        key = next((key for key in weights if key.endswith("posembed_input/pos_embedding")), None)
        embedding = None if key is None else weights[key]
    if embedding is None:
        return model.patch_embed.img_size
    side = math.isqrt(embedding.shape[1] - position_prefix(model))
    return tuple(side * pixels for pixels in model.patch_embed.patch_size)


def _freeze_unused(encoder: nn.Module) -> None:
    """Freeze what the features do not use (classifier, pooling): DistributedDataParallel waits for every
    parameter that wants a gradient. The 1000-class head itself stays, since released checkpoints have it."""
    for name in ("head", "head_dist", "fc_norm", "attn_pool"):
        module = getattr(encoder, name, None)
        if module is not None:
            module.requires_grad_(False)
