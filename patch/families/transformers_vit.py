"""The plain ViTs of the library transformers: ViT, DeiT, DINOv2 (also with registers), DINOv3, SigLIP's vision tower;
models that hold one of them; and EoMT, whose queries join the tokens of the last blocks."""

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from patch.families.base import OpenBlock, OpenFamily, Patched, check_plain, own_class, put_in_front
from patch.state import Merging, Pass

LIBRARY = "transformers.models."
STACKS = ("layers", "encoder.layer", "encoder.layers", "model.layer")  # where a ViT keeps its blocks
ATTENTIONS = ("sdpa", "eager")


class Names(NamedTuple):
    """What a block calls its parts; None: it has none."""

    attention: str
    norm1: str
    norm2: str
    scale1: str | None = None
    scale2: str | None = None
    drop: str | None = None


SCALED = Names("attention", "norm1", "norm2", "layer_scale1", "layer_scale2", "drop_path")
PLAIN = Names("attention", "layernorm_before", "layernorm_after", drop="dropout")
BLOCKS = {
    "ViTLayer": PLAIN,
    "DeiTLayer": PLAIN,
    "Dinov2Layer": SCALED,
    "Dinov2WithRegistersLayer": SCALED,
    "DINOv3ViTLayer": SCALED,
    "EomtLayer": SCALED,
    "SiglipEncoderLayer": Names("self_attn", "layer_norm1", "layer_norm2"),
}


class PatchedLayer(OpenBlock):
    """A block of transformers, which looks at outputs of blocks through hooks, for `output_hidden_states`."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, L, D) -> (B, L', D); outside of a pass, as unpatched."""
        here = self.merging.current
        if here is None:
            rope = {} if position_embeddings is None else {"position_embeddings": position_embeddings}
            return super().forward(hidden_states, attention_mask, **rope, **kwargs)
        check_plain(attention_mask, False)
        if self.training and getattr(self, "gradient_checkpointing", False):
            raise ValueError(
                "a patched model cannot run with gradient checkpointing, it would merge twice: turn that off"
            )
        rope = None if position_embeddings is None else torch.cat(position_embeddings[::-1], dim=-1)
        return self.go(hidden_states, rope)

    @property
    def names(self) -> Names:
        """What its parts are called."""
        return BLOCKS[own_class(self).__name__]

    @property
    def attn(self) -> Any:
        """Its attention module."""
        return getattr(self, self.names.attention)

    @property
    def attention_is_fused(self) -> bool:
        return self.attn.config._attn_implementation == "sdpa"

    @property
    def attention_scale(self) -> float:
        attn = self.attn
        return attn.scaling if hasattr(attn, "scaling") else attn.scale

    @property
    def attention_dropout(self) -> float:
        attn = self.attn
        return attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout

    def run_attention(self, normed: Tensor, mask: Tensor | None, rope: Tensor | None) -> Tensor:
        more = {} if rope is None else {"position_embeddings": tuple(rope.chunk(2, dim=-1)[::-1])}
        return self.attn(normed, attention_mask=mask, **more)[0]

    def normalized(self, x: Tensor) -> Tensor:
        return getattr(self, self.names.norm1)(x)

    def attend(self, x: Tensor, here: Pass, rope: Tensor | None = None) -> Tensor:
        """The half before the merge; x: (B, L, D)."""
        out = self.attention_of(self.normalized(x), here, here.rotary(rope))
        return x + self._leave(out, self.names.scale1, here)

    def feed(self, x: Tensor, here: Pass) -> Tensor:
        """The half after the merge; x: (B, L, D)."""
        return x + self._leave(self.mlp(getattr(self, self.names.norm2)(x)), self.names.scale2, here)

    def _leave(self, x: Tensor, scale: str | None, here: Pass) -> Tensor:
        """Layer scale and what is dropped, where the block has them."""
        x = x if scale is None else getattr(self, scale)(x)
        drop = None if self.names.drop is None else getattr(self, self.names.drop)
        if isinstance(drop, nn.Dropout) or drop is None:  # of single values, not of whole images
            return x if drop is None else drop(x)
        return here.drop(drop, x)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """(B, L, D) -> (B, H, L, d) each"""
        attn = self.attn
        both = (projection(normed).unflatten(-1, (-1, attn.head_dim)) for projection in (attn.q_proj, attn.k_proj))
        query, key = (x.transpose(1, 2) for x in both)
        return query, key

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """(B, H, L, d), but for the prefix tokens"""
        sine, cosine = rope.chunk(2, dim=-1)
        apply = sys.modules[type(self.attn).__module__].apply_rotary_pos_emb
        return apply(x, x, cosine, sine)[0]


class PatchedEmbeddings(Patched):
    """The embeddings of a ViT of transformers, with which a pass begins."""

    ATTRIBUTES = ("merging", "patch_sides")

    merging: Merging
    patch_sides: tuple[int, int]

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(B, 3, H, W) -> (B, P + N, D)"""
        height, width = (side // patch for side, patch in zip(pixel_values.shape[-2:], self.patch_sides, strict=True))
        self.merging.begin((height, width))
        return super().forward(pixel_values, *args, **kwargs)


class TransformersViT(OpenFamily):
    """The plain ViTs of transformers."""

    name = "transformers' ViT, DeiT, DINOv2, DINOv3, SigLIP and EoMT"
    block_front = PatchedLayer

    def knows(self, model: nn.Module) -> bool:
        return type(model).__module__.startswith(LIBRARY) and stack_of(model) is not None

    def check(self, model: nn.Module) -> None:
        chosen = model.config._attn_implementation
        if chosen not in ATTENTIONS:
            raise ValueError(f"cannot patch a model with {chosen} attention: load it with sdpa or eager attention")
        if getattr(model, "attn_mask_probs", torch.zeros(1)).any():
            raise ValueError(
                "cannot merge while EoMT masks its attention: fill model.attn_mask_probs with zeros, as after training"
            )

    def blocks(self, model: nn.Module) -> Sequence[nn.Module]:
        return list(stack_of(model) or ())

    def prefix(self, model: nn.Module) -> int:
        embeddings: Any = model.embeddings
        registers = getattr(embeddings, "register_tokens", None)
        ones = sum(getattr(embeddings, name, None) is not None for name in ("cls_token", "distillation_token"))
        return ones + (0 if registers is None else registers.shape[1])

    def in_front(self, model: nn.Module, index: int) -> tuple[int, bool]:
        own, end = super().in_front(model, index)
        joining = len(self.blocks(model)) - getattr(model.config, "num_blocks", 0)  # blocks before the queries join
        return own + (n_queries(model) if index > joining else 0), end or (n_queries(model) > 0 and index == joining)

    def has_cls(self, model: nn.Module) -> bool:
        # Behind EoMT's queries the CLS token is not the first one.
        return getattr(model.embeddings, "cls_token", None) is not None and not n_queries(model)

    def grid(self, model: nn.Module, size: Sequence[int] | None = None) -> tuple[int, int]:
        config: Any = model.config
        whole, patch = (_pair(value) for value in (size or config.image_size, config.patch_size))
        return whole[0] // patch[0], whole[1] // patch[1]

    def begin(self, model: nn.Module, merging: Merging) -> None:
        embeddings: Any = model.embeddings
        put_in_front(embeddings, PatchedEmbeddings, merging=merging, patch_sides=_pair(model.config.patch_size))


def n_queries(model: nn.Module) -> int:
    """Number of learned queries that join the tokens; 0 for a plain ViT."""
    return model.config.num_queries if isinstance(getattr(model, "query", None), nn.Embedding) else 0


def stack_of(model: nn.Module) -> nn.ModuleList | None:
    """The blocks of a ViT of transformers; None: the model is none, though it may hold one."""
    if not hasattr(model, "embeddings"):
        return None
    for path in STACKS:
        found: Any = model
        for name in path.split("."):
            found = getattr(found, name, None)
        if isinstance(found, nn.ModuleList) and len(found) and own_class(found[0]).__name__ in BLOCKS:
            return found
    return None


def _pair(value: Any) -> tuple[int, int]:
    height, width = (value, value) if isinstance(value, int) else value
    return int(height), int(width)
