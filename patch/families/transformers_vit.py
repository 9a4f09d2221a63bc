"""The plain ViTs of the library transformers: ViT, DeiT, MAE, DINOv2 (also with registers), DINOv3, the vision towers
of CLIP, SigLIP and SigLIP 2; models that hold one of them; and EoMT, whose queries join the tokens of the last blocks.
"""

import math
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patch.attention import AttentionMask
from patch.families.base import (
    OpenBlock,
    OpenFamily,
    PatchedEmbedding,
    PatchedModel,
    check_forward,
    check_plain,
    modules_of,
    note_outside,
    own_class,
)
from patch.layout import Rows

LIBRARY = "transformers.models."
STACKS = ("layers", "encoder.layer", "encoder.layers", "model.layer")  # where a ViT keeps its blocks
ATTENTIONS = ("sdpa", "eager")
CLS = ("cls_token", "class_embedding")
UNMASKED = "fill model.attn_mask_probs with zeros, as after training"


class Names(NamedTuple):
    """Names of the parts of a block; None: it has none."""

    attention: str
    norm1: str
    norm2: str
    scale1: str | None = None
    scale2: str | None = None
    drop: str | None = None


SCALED = Names("attention", "norm1", "norm2", "layer_scale1", "layer_scale2", "drop_path")
PLAIN = Names("attention", "layernorm_before", "layernorm_after", drop="dropout")
OLDER = Names("attention", "layernorm_before", "layernorm_after")
TOWER = Names("self_attn", "layer_norm1", "layer_norm2")
BLOCKS = {
    "ViTLayer": PLAIN,
    "DeiTLayer": PLAIN,
    "DPTViTLayer": OLDER,  # patched as transformers_dpt says
    "ViTMAELayer": PLAIN,
    "ViTMSNLayer": PLAIN,
    "IJepaLayer": PLAIN,
    "Dinov2Layer": SCALED,
    "Dinov2WithRegistersLayer": SCALED,
    "DINOv3ViTLayer": SCALED,
    "EomtLayer": SCALED,
    "EomtDinov3Layer": SCALED,
    "SiglipEncoderLayer": TOWER,
    "Siglip2EncoderLayer": TOWER,
    "CLIPEncoderLayer": TOWER,
    "MetaClip2EncoderLayer": TOWER,
}


class PatchedLayer(OpenBlock):
    """A block of transformers, which looks at outputs of blocks through hooks, for `output_hidden_states`."""

    mlp: Any
    takes_mask = True  # the library's own block, in second place

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, L, D) -> (B, L', D); outside of a pass, as unpatched."""
        if self._patch.merging.current is None:
            note_outside(self)
            masks = (attention_mask,) if self.takes_mask else ()
            rope = {} if position_embeddings is None else {"position_embeddings": position_embeddings}
            return super().forward(hidden_states, *masks, **rope, **kwargs)
        if not (torch.compiler.is_exporting() or torch.jit.is_tracing()):  # then the library makes one
            check_plain(attention_mask, False)
        if self.training and getattr(self, "gradient_checkpointing", False):
            raise ValueError(
                "a patched model cannot run with gradient checkpointing, it would merge twice: turn that off"
            )
        return self.run(
            hidden_states, None if position_embeddings is None else torch.cat(position_embeddings[::-1], -1)
        )

    @property
    def names(self) -> Names:
        """Names of its parts."""
        return names_of(self)

    @property
    def _attn(self) -> Any:
        return getattr(self, self.names.attention)

    @property
    def attention_is_fused(self) -> bool:
        return self._attn.config._attn_implementation == "sdpa"

    @property
    def attention_scale(self) -> float:
        return self._attn.scaling if hasattr(self._attn, "scaling") else self._attn.scale

    @property
    def attention_dropout(self) -> float:
        attn = self._attn
        return attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout

    def run_attention(self, normed: Tensor, mask: AttentionMask | Tensor | None, rotary: Tensor | None) -> Tensor:
        more = {} if rotary is None else {"position_embeddings": tuple(rotary.chunk(2, dim=-1)[::-1])}
        return self._attn(normed, attention_mask=mask, **more)[0]

    def normalized(self, x: Tensor) -> Tensor:
        return getattr(self, self.names.norm1)(x)

    def add_attention(self, x: Tensor, out: Tensor, layout: Rows) -> Tensor:
        return x + self._scaled(out, self.names.scale1, layout)

    def feed(self, x: Tensor, layout: Rows) -> Tensor:
        return x + self._scaled(self.mlp(getattr(self, self.names.norm2)(x)), self.names.scale2, layout)

    def _scaled(self, x: Tensor, scale: str | None, layout: Rows) -> Tensor:
        """Layer scale and dropout, where the block has them."""
        x = x if scale is None else getattr(self, scale)(x)
        drop = None if self.names.drop is None else getattr(self, self.names.drop)
        if isinstance(drop, nn.Dropout) or drop is None:  # of single values, not of whole images
            return x if drop is None else drop(x)
        return layout.drop(drop, x)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        attn = self._attn
        each = (
            project(normed).unflatten(-1, (-1, attn.head_dim)) for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
        query, key, value = (x.transpose(1, 2) for x in each)
        return query, key, value

    def rotate(self, x: Tensor, rotary: Tensor) -> Tensor:
        sine, cosine = rotary.chunk(2, dim=-1)
        apply = sys.modules[own_class(self._attn).__module__].apply_rotary_pos_emb
        return apply(x, x, cosine, sine)[0]


class PatchedEmbeddings(PatchedEmbedding):
    """The embeddings of a ViT of transformers."""

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, 3, H, W) -> (B, P + N, D)"""
        self.tell_grid([side // p for side, p in zip(pixel_values.shape[-2:], self._patch.more, strict=True)])
        return super().forward(pixel_values, *args, **kwargs)


class PatchedShuffle(PatchedEmbeddings):
    """MAE's embeddings, which shuffle the patches by noise."""

    def forward(self, pixel_values: Tensor, noise: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """(B, 3, H, W) -> ((B, P + N, D), mask, the way back); in a pass patches stay in their order."""
        if self._patch.merging.current is not None:
            if noise is None:
                sides = zip(pixel_values.shape[-2:], self._patch.more, strict=True)
                n_patches = math.prod(side // p for side, p in sides)
                noise = torch.arange(n_patches, device=pixel_values.device).float().repeat(len(pixel_values), 1)
            elif bool((noise.diff(dim=1) < 0).any()):
                raise ValueError("a patched MAE keeps its patches in their order: pass no noise, or ascending numbers")
        return super().forward(pixel_values, noise, *args, **kwargs)


class PatchedShapes(PatchedEmbedding):
    """SigLIP 2's embeddings, which get patches of images of several shapes."""

    def forward(self, pixel_values: Tensor, spatial_shapes: Tensor) -> Tensor:
        """(B, N, 3·p·p), (B, 2) -> (B, N, D)"""
        if self._patch.merging.current is not None:
            if torch.compiler.is_compiling() or torch.jit.is_tracing():
                raise ValueError("the grid of a patched SigLIP 2 is read in every pass: run it eagerly")
            shapes = spatial_shapes.unique(dim=0).tolist()
            if len(shapes) > 1:
                raise ValueError(f"a patched SigLIP 2 takes images of one shape at a time, these have {len(shapes)}")
            self.tell_grid(*shapes or [(0, 0)])
        return super().forward(pixel_values, spatial_shapes)


class PatchedTransformer(PatchedModel):
    """A ViT of transformers: its call starts and ends a pass."""

    config: Any

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As unpatched; all patches come back."""
        check_attention(self.config)
        check_plain(kwargs.get("attention_mask"), False)
        check_masking(self)
        with self._patch.merging.start_pass(self, [*(stack_of(self) or ())]) as track:
            return track.release_with(super().forward(*args, **kwargs))


class TransformersViT(OpenFamily):
    """The plain ViTs of transformers."""

    name = "transformers' ViT, DeiT, MAE, DINOv2, DINOv3, CLIP, SigLIP and EoMT"
    block_mixin = PatchedLayer
    model_mixin = PatchedTransformer

    def knows(self, model: nn.Module) -> bool:
        return any(cls.__module__.startswith(LIBRARY) for cls in type(model).__mro__) and stack_of(model) is not None

    def check(self, model: Any) -> None:
        check_attention(model.config)
        check_forward([model, model.embeddings, *modules_of(self.blocks(model))])
        for block in self.blocks(model):
            check_parts(block)
        if bool(getattr(model, "attn_mask_probs", torch.zeros(1)).any()):
            raise ValueError(f"cannot merge while EoMT masks its attention: {UNMASKED}")
        if getattr(model.config, "mask_ratio", 0):
            raise ValueError("cannot patch a MAE that drops patches: set model.config.mask_ratio = 0")

    def blocks(self, model: Any) -> Sequence[Any]:
        return list(stack_of(model) or ())

    def n_prefix(self, model: Any) -> int:
        embeddings = model.embeddings
        registers = getattr(embeddings, "register_tokens", None)
        ones = sum(getattr(embeddings, name, None) is not None for name in (*CLS, "distillation_token"))
        return ones + (0 if registers is None else registers.shape[1])

    def n_queries(self, model: Any) -> tuple[int, int]:
        if not isinstance(getattr(model, "query", None), nn.Embedding):
            return 0, 0
        return model.config.num_queries, len(self.blocks(model)) - model.config.num_blocks

    def has_cls(self, model: Any) -> bool:
        # Behind EoMT's queries the CLS token is not the first one.
        first = any(getattr(model.embeddings, name, None) is not None for name in CLS)
        return first and not self.n_queries(model)[0]

    def grid(self, model: Any, size: Sequence[int] | None = None) -> tuple[int, int]:
        config = model.config
        if size is None and not hasattr(config, "image_size"):  # of SigLIP 2
            return (math.isqrt(config.num_patches),) * 2
        whole, patch = (_pair(value) for value in (size or config.image_size, config.patch_size))
        return whole[0] // patch[0], whole[1] // patch[1]

    def rotary_table(self, model: Any, grid: tuple[int, int]) -> Tensor:
        sides = [own * p for own, p in zip(grid, _pair(model.config.patch_size), strict=True)]
        image = next(model.parameters()).new_empty(1, 1, 1, 1).expand(1, 3, *sides)
        return torch.cat(model.rope_embeddings(image)[::-1], -1)

    def embedding(self, model: Any) -> tuple[nn.Module, type[PatchedEmbedding], Any]:
        kind: type[PatchedEmbedding] = PatchedEmbeddings
        if hasattr(model.embeddings, "random_masking"):
            kind = PatchedShuffle
        elif hasattr(model.embeddings, "resize_positional_embeddings"):
            kind = PatchedShapes
        return model.embeddings, kind, _pair(model.config.patch_size)


def names_of(block: nn.Module) -> Names:
    """Names of the parts of a block, by its class or the one that it derives from."""
    return next(BLOCKS[cls.__name__] for cls in own_class(block).__mro__ if cls.__name__ in BLOCKS)


def is_block(module: nn.Module) -> bool:
    """Return whether a module is a block that can be patched."""
    return any(cls.__name__ in BLOCKS and cls.__module__.startswith(LIBRARY) for cls in own_class(module).__mro__)


def check_parts(block: Any) -> None:
    """Raise a ValueError for a block that lacks a part which a patch uses: another version of the library's."""
    names = names_of(block)
    attn = getattr(block, names.attention, None)
    needed = {name: block for name in names if name is not None}
    needed |= dict.fromkeys(("q_proj", "k_proj", "head_dim", "config"), attn)
    missing = [name for name, owner in needed.items() if not hasattr(owner, name)]
    if missing:
        raise ValueError(
            f"cannot patch a {own_class(block).__name__} that lacks {', '.join(missing)}: install transformers 5.18 or "
            "newer"
        )


def check_masking(model: Any) -> None:
    """Raise a ValueError for an EoMT that would mask its attention in this pass, patch by patch."""
    masked = getattr(model, "attn_mask_probs", None)
    if masked is None or torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    if model.training or bool(masked.any()):
        raise ValueError(f"cannot merge while EoMT masks its attention: call model.eval(), and {UNMASKED}")


def check_attention(config: Any) -> None:
    """Raise a ValueError for an implementation of attention that takes no mask of ours."""
    chosen = config._attn_implementation
    if chosen not in ATTENTIONS:
        raise ValueError(f"cannot patch a model with {chosen} attention: load it with sdpa or eager attention")


def stack_of(model: Any) -> nn.ModuleList | None:
    """The blocks of a ViT of transformers; None: the model is none, though it may hold one."""
    embeddings = getattr(model, "embeddings", None)
    if not isinstance(embeddings, nn.Module) or getattr(model, "main_input_name", None) != "pixel_values":
        return None  # a tower of text
    for path in STACKS:
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList) and len(found) and is_block(found[0]):
            return found
    return None


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)
