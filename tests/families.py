"""Tiny models with random weights, one of every family that `patch.apply` knows, for 16 patches of 8 pixels."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import patch
from segm.model.factory import create_segmenter
from tests.helpers import METHOD_OPTIONS, options_for, with_parts

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 8, 32, 3, 2
TIMM = {"img_size": SIDE, "patch_size": PATCH, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS, "num_classes": 5}
HF = {"hidden_size": WIDTH, "num_hidden_layers": DEPTH, "num_attention_heads": HEADS, "intermediate_size": 4 * WIDTH}
HF |= {"image_size": SIDE, "patch_size": PATCH}
NET = {"backbone": "vit_tiny_patch16_384", "image_size": [SIDE, SIDE], "patch_size": PATCH, "d_model": WIDTH}
NET |= {"n_heads": HEADS, "n_layers": DEPTH, "n_cls": 5, "decoder": {"name": "linear"}}
MASKS = {"decoder": {"name": "mask_transformer", "n_layers": 1, "dropout": 0.0}}
LEARNED = ("dtem", "clustvit")  # cannot do without parts that timm's ViTs alone can take


@dataclass(frozen=True)
class Family:
    """One kind of model.

    Attributes:
        build: makes one, in evaluation mode, with weights so large that every part matters.
        run: (model, images (B, 3, 32, 32)) -> a tensor that every patch takes part in.
        blocks: (model) -> the blocks of its ViT.
        n_prefix: of tokens in front of the patches.
        has_cls: whether one of them is a CLS token that is the first.
        learns: whether learned parts can be built into it.
    """

    build: Callable[..., nn.Module]
    run: Callable[[nn.Module, Tensor], Tensor]
    blocks: Callable[[nn.Module], Iterable[nn.Module]]
    n_prefix: int = 1
    has_cls: bool = True
    learns: bool = False

    @property
    def methods(self) -> list[str]:
        """Those that this kind can take."""
        missing = {*(() if self.learns else LEARNED), *(() if self.has_cls else ("diffrate",))}
        return [name for name in METHOD_OPTIONS if name not in missing]

    def patched(self, method: str, *, model: nn.Module | None = None, **options: Any) -> nn.Module:
        """A patched model; the options are those of METHOD_OPTIONS, and these."""
        model = self.build() if model is None else model
        if self.learns:
            with_parts(getattr(model, "encoder", model), method)
        return patch.apply(model, method, **options_for(method, **options))


@torch.no_grad()
def strengthen(model: nn.Module) -> nn.Module:
    """Random weights of size 0.3; what scales is around 1."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        scales = parameter.ndim == 1 and any(word in name for word in ("weight", "lambda", "gamma"))
        parameter.normal_(1.0 if scales else 0.0, 0.3)
    return model.eval()


def vit(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
    """A ViT of timm."""
    return strengthen(timm.create_model(name, **TIMM | options))


def eva(**options: Any) -> nn.Module:
    """A rotary ViT of timm, with 4 register tokens."""
    return vit("vit_small_patch16_dinov3", **options)


def hugging(kind: str = "Dinov2", attention: str = "sdpa", cls: str = "Model", **options: Any) -> nn.Module:
    """A ViT of transformers; `kind` as its classes begin."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**HF | options)
    config._attn_implementation = attention
    return strengthen(getattr(transformers, f"{kind}{cls}")(config))


def eomt(attention: str = "sdpa") -> nn.Module:
    """EoMT, whose queries join the tokens of the last of three blocks."""
    queries = {"num_blocks": 1, "num_queries": 4, "num_labels": 3, "num_upscale_blocks": 1, "num_register_tokens": 2}
    with torch.no_grad():
        model = hugging("Eomt", attention, "ForUniversalSegmentation", mlp_ratio=4, **queries)
        model.attn_mask_probs.zero_()
    return model


def mmseg(**options: Any) -> nn.Module:
    """mmsegmentation's ViT."""
    from segm.data import openmmlab  # noqa: F401 -- registers, and keeps the import quiet

    vision = pytest.importorskip("mmseg.models").VisionTransformer
    sizes = {"img_size": (SIDE, SIDE), "patch_size": PATCH, "embed_dims": WIDTH, "num_layers": DEPTH}
    sizes |= {"num_heads": HEADS, "norm_cfg": {"type": "LN", "eps": 1e-6}, "final_norm": True}
    model = vision(**sizes | options)
    strengthen(model)
    return model


def segmenter(**net: Any) -> nn.Module:
    """A Segmenter with a linear decoder, or as `net` says."""
    return strengthen(create_segmenter(NET | net))


def last_state(model: nn.Module, images: Tensor) -> Tensor:
    """(B, P + N, D)"""
    return model(images).last_hidden_state


def timm_family(build: Callable[..., nn.Module], n_prefix: int) -> Family:
    return Family(build, lambda m, x: m.forward_features(x), lambda m: m.blocks, n_prefix, learns=True)


def hugging_family(kind: str, n_prefix: int, blocks: Callable[[nn.Module], Any], **more: Any) -> Family:
    options = more.pop("options", {})
    return Family(lambda **k: hugging(kind, **options | k), last_state, blocks, n_prefix, **more)


FAMILIES = {
    "vit": timm_family(vit, 1),
    "eva": timm_family(eva, 5),
    "Dinov2": hugging_family("Dinov2", 1, lambda m: m.encoder.layer),
    "ViT": hugging_family("ViT", 1, lambda m: m.layers if hasattr(m, "layers") else m.encoder.layer),
    "DPT": hugging_family("DPT", 1, lambda m: m.encoder.layer),
    "DINOv3ViT": hugging_family(
        "DINOv3ViT", 5, lambda m: m.model.layer if hasattr(m, "model") else m.layer, options={"num_register_tokens": 4}
    ),
    "SiglipVision": hugging_family(
        "SiglipVision",
        0,
        lambda m: getattr(m, "vision_model", m).encoder.layers,
        has_cls=False,
        options={"vision_use_head": False},
    ),
    "Eomt": Family(eomt, lambda m, x: m(x).masks_queries_logits, lambda m: m.layers, 3, has_cls=False),
    "mmseg": Family(mmseg, lambda m, x: m(x)[-1], lambda m: m.layers),
    "segmenter": Family(segmenter, lambda m, x: m(x), lambda m: m.encoder.blocks, learns=True),
    "mask transformer": Family(lambda: segmenter(**MASKS), lambda m, x: m(x), lambda m: m.encoder.blocks, learns=True),
}
EXPOSED = [name for name in FAMILIES if name not in ("Eomt", "segmenter", "mask transformer", "mmseg")]


def states(model: nn.Module, images: Tensor) -> list[Tensor]:
    """The output, and those of the blocks, (B, P + N, D) each, of a model out of `EXPOSED`."""
    if hasattr(model, "forward_intermediates"):
        indices = list(range(len(model.blocks)))
        last, found = model.forward_intermediates(images, indices, output_fmt="NLC", return_prefix_tokens=True)
        return [last, *(torch.cat([prefix, patches], 1) for patches, prefix in found)]
    found = model(images, output_hidden_states=True)
    return [found.last_hidden_state, *found.hidden_states[1:]]
