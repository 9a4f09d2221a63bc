"""SETR's decoders and UPerNet, by mmsegmentation's classes. Imports mmseg: import this module only to build one."""

import contextlib
import io
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from segm.errors import TRAINING

try:
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it prints, and warns of missing operators
        from mmseg.models.decode_heads import FCNHead, SETRMLAHead, SETRUPHead, UPerHead
        from mmseg.models.necks import Feature2Pyramid, MLANeck
except ModuleNotFoundError as error:
    raise ValueError(f"this decoder is mmsegmentation's, which is not installed: {TRAINING}") from error

NORM = {"type": "BN", "requires_grad": True}
CHANNELS = 256
AUXILIARY = (10, 15, 20)  # of 24 blocks, counted from 1 (SETR, section 4.1)


def on_grid(head: nn.Module, reads: Sequence[int], scale: int, neck: nn.Module | None = None) -> nn.Module:
    """A head of mmsegmentation as a decoder that reads maps, as `segm.model.decoder.LinearBN` does."""
    head.neck = neck or nn.Identity()
    head.blocks = nn.ModuleList()  # no attention: nothing to patch, nothing to show
    head.reads, head.scale = [*reads], scale
    return initialized(head)


def initialized(head: Any) -> nn.Module:
    """A head with the initial values that mmsegmentation gives it, whose own function for this writes a log."""
    nn.init.normal_(head.conv_seg.weight, std=0.01)
    nn.init.zeros_(head.conv_seg.bias)
    return head


def _common(n_cls: int) -> dict[str, Any]:
    return {"num_classes": n_cls, "dropout_ratio": 0.0, "norm_cfg": NORM, "align_corners": False}


def _up(dim: int, n_cls: int, index: int, n_convs: int, up_scale: int, kernel: int) -> nn.Module:
    """One of SETR's upsampling heads."""
    sizes = {"in_channels": dim, "channels": CHANNELS, "in_index": index, "num_convs": n_convs, "up_scale": up_scale}
    return SETRUPHead(**sizes, kernel_size=kernel, **_common(n_cls))


def _fcn(width: int, n_cls: int, index: int, n_convs: int, kernel: int) -> nn.Module:
    sizes = {"in_channels": width, "channels": CHANNELS, "in_index": index, "num_convs": n_convs}
    return initialized(FCNHead(**sizes, kernel_size=kernel, concat_input=False, **_common(n_cls)))


def _quarters(depth: int) -> list[int]:
    """0-based blocks at each quarter of the depth."""
    return [-(-depth * part // 4) - 1 for part in (1, 2, 3, 4)]


def setr(dim: int, n_cls: int, depth: int, n_convs: int, up_scale: int, kernel: int) -> tuple[nn.Module, list]:
    """SETR (Zheng et al., 2021, section 3.3): convolutions, each with an upsampling, and a last one."""
    reads = [*(-(-depth * block // 24) - 1 for block in AUXILIARY), depth - 1]
    main = on_grid(_up(dim, n_cls, len(AUXILIARY), n_convs, up_scale, kernel), reads, up_scale**n_convs)
    return main, [initialized(_up(dim, n_cls, index, 1, 4, kernel)) for index in range(len(AUXILIARY))]


def setr_mla(dim: int, n_cls: int, depth: int) -> tuple[nn.Module, list[nn.Module]]:
    """SETR-MLA: four blocks, summed up from the deepest to the shallowest, convolved and concatenated."""
    neck = MLANeck([dim] * 4, CHANNELS, norm_cfg=NORM, act_cfg={"type": "ReLU"})
    sizes = {"in_channels": (CHANNELS,) * 4, "in_index": (0, 1, 2, 3), "mla_channels": 128, "channels": 512}
    main = on_grid(SETRMLAHead(**sizes, **_common(n_cls)), _quarters(depth), 4, neck)
    return main, [_fcn(CHANNELS, n_cls, index, 0, 1) for index in range(4)]


def upernet(dim: int, n_cls: int, depth: int) -> tuple[nn.Module, list[nn.Module]]:
    """UPerNet (Xiao et al., 2018) on four blocks, whose maps are resized to a pyramid."""
    neck = Feature2Pyramid(dim, rescales=[4, 2, 1, 0.5], norm_cfg=NORM)
    sizes = {"in_channels": [dim] * 4, "in_index": [0, 1, 2, 3], "pool_scales": (1, 2, 3, 6), "channels": 512}
    main = on_grid(UPerHead(**sizes, **_common(n_cls)), _quarters(depth), 4, neck)
    return main, [_fcn(dim, n_cls, 2, 1, 3)]


def build(name: str, dim: int, n_cls: int, depth: int) -> tuple[nn.Module, list[nn.Module]]:
    """A decoder of `BUILDERS` and its auxiliary heads; dim, depth: width and blocks of the encoder."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of mmsegmentation's losses, which nothing here uses
        return BUILDERS[name](dim, n_cls, depth)


BUILDERS: dict[str, Callable[[int, int, int], tuple[nn.Module, list[nn.Module]]]] = {
    "setr_naive": partial(setr, n_convs=1, up_scale=4, kernel=1),
    "setr_pup": partial(setr, n_convs=4, up_scale=2, kernel=3),
    "setr_mla": setr_mla,
    "upernet": upernet,
}
