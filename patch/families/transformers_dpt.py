"""DPT's own ViT in transformers (`DPTModel`), whose blocks are of the library's older form: their attention takes no
mask by itself, and the MLP comes in two modules, of which the second adds the residual."""

import sys
from typing import Any

from torch import Tensor, nn

from patch.attention import AttentionMask
from patch.families.base import Patched, Record, check_forward, mix_in, modules_of, own_class
from patch.families.transformers_vit import PatchedLayer, TransformersViT, check_attention
from patch.track import Merging

MODEL = "DPTModel"
PARTS = "query", "key", "value", "attention_head_size", "scaling", "dropout_prob", "config"


class PatchedSelfAttention(Patched):
    """DPT's self-attention, given a mask of merged tokens."""

    config: Any
    scaling: float
    dropout_prob: float

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See `PatchedBlock.project`."""
        own: Any = self
        each = (of(normed).unflatten(-1, (-1, own.attention_head_size)) for of in (own.query, own.key, own.value))
        query, key, value = (x.transpose(1, 2) for x in each)
        return query, key, value

    def forward(
        self, hidden_states: Tensor, attention_mask: AttentionMask | Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D) before its last projection, and the weights where it forms them."""
        if attention_mask is None:
            return super().forward(hidden_states, **kwargs)
        library = sys.modules[own_class(self).__module__]
        chosen, explicit = self.config._attn_implementation, library.eager_attention_forward
        attend = library.ALL_ATTENTION_FUNCTIONS.get_interface(chosen, explicit)
        dropout = self.dropout_prob if self.training else 0.0
        known = {"scaling": self.scaling, "dropout": dropout, "is_causal": False}
        out, weights = attend(self, *self.project(hidden_states), attention_mask, **known, **kwargs)
        return out.flatten(-2), weights


class PatchedDPTLayer(PatchedLayer):
    """`DPTViTLayer`."""

    attention: Any
    intermediate: Any
    output: Any
    takes_mask = False

    @property
    def _attn(self) -> Any:
        return self.attention.attention

    @property
    def attention_dropout(self) -> float:
        return self._attn.dropout_prob

    def run_attention(self, normed: Tensor, mask: AttentionMask | Tensor | None, rotary: Tensor | None) -> Tensor:
        return self.attention(normed, attention_mask=mask)

    def feed(self, x: Tensor, layout: Any) -> Tensor:
        return self.output(self.intermediate(getattr(self, self.names.norm2)(x)), x)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self._attn.project(normed)


class TransformersDPT(TransformersViT):
    """transformers' `DPTModel`, hybrid or not, and models that hold it."""

    name = "transformers' DPT"
    block_mixin = PatchedDPTLayer

    def attach(self, model: Any, merging: Merging) -> None:
        super().attach(model, merging)
        for block in self.blocks(model):
            mix_in(block.attention.attention, PatchedSelfAttention, _patch=Record(merging))

    def knows(self, model: nn.Module) -> bool:
        return super().knows(model) and any(cls.__name__ == MODEL for cls in type(model).__mro__)

    def check(self, model: Any) -> None:
        check_attention(model.config)
        check_forward([model, model.embeddings, *modules_of(self.blocks(model))])
        for block in self.blocks(model):
            attn = getattr(block.attention, "attention", None)
            missing = [name for name in PARTS if not hasattr(attn, name)]
            if missing:
                raise ValueError(
                    f"cannot patch a {own_class(block).__name__} that lacks {', '.join(missing)}: install transformers "
                    "5.24, whose DPT is known"
                )
