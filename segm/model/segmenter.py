"""The Segmenter: encoder, decoder, and the way back to pixels."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn

from segm.model.attention import recorded_attention
from segm.model.masks import Prediction, best_classes, class_scores
from segm.model.upsample import label_map, to_pixels

if TYPE_CHECKING:
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer


class Segmenter(nn.Module):
    """Segmenter (Strudel et al., 2021): a ViT encoder, and a decoder that gives every patch token its logits.

    Args:
        encoder: from `segm.model.encoder.create_encoder`.
        decoder: from `segm.model.decoder.create_decoder`.
        n_cls: number of classes.
        aux_heads: heads that are trained with a decoder on the grid, and take the same maps.

    Attributes:
        mask_attention: whether attention of queries is masked in training; not in a patched model, whose tokens are no
            patches.
    """

    mask_attention = True

    def __init__(
        self, encoder: "VisionTransformer | Eva", decoder: nn.Module, n_cls: int, aux_heads: Iterable[nn.Module] = ()
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.n_cls = n_cls
        self.aux_heads = nn.ModuleList(aux_heads)

    @property
    def patch_size(self) -> tuple[int, int]:
        """Pixels per patch, (height, width)."""
        height, width = self.encoder.patch_embed.patch_size
        return height, width

    @property
    def on_grid(self) -> bool:
        """Return whether the decoder reads maps (as `segm.model.decoder.LinearBN`), not tokens."""
        return hasattr(self.decoder, "reads")

    @property
    def predicts_masks(self) -> bool:
        """Return whether the decoder gives masks and classes of queries (`segm.model.masks`), not logits."""
        return getattr(self.decoder, "predicts_masks", False)

    @property
    def scale(self) -> int:
        """Rows and columns of logits per patch."""
        return getattr(self.decoder, "scale", 1)

    @property
    def has_queries(self) -> bool:
        """Return whether queries join the tokens of the last blocks (`segm.model.encoder.QueryEncoder`)."""
        return hasattr(self.encoder, "queries")

    def queries_in(self, layer_id: int) -> int:
        """Number of queries among the tokens of a block of the encoder; layer_id: counted from 0."""
        joined = self.has_queries and layer_id >= len(self.encoder.blocks) - self.encoder.n_query_blocks
        return self.decoder.n_queries if joined else 0

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are embeddings, which optimizers do not decay."""
        own = {f"encoder.{name}" for name in self.encoder.no_weight_decay()}
        return own | {"decoder.cls_emb", "decoder.query", "encoder.queries"}

    def grid_logits(self, images: Tensor) -> Tensor:
        """Class logits per patch: the model without the upsampling.

        Args:
            images: (B, 3, H, W), normalized.

        Returns:
            (B, n_cls, ceil(H / ph), ceil(W / pw)); times `scale` in both directions. From masks they are scores, 0 to
            the number of queries, and no logits: windows are averaged as they are.
        """
        found = self.network(images)
        return class_scores(found, self._scaled(images.shape[-2:])) if self.predicts_masks else found

    def network(self, images: Tensor) -> Any:
        """Output of encoder and decoder: `grid_logits`, or the `Prediction` of queries, which has fewer pixels."""
        grid = self.grid(images.shape[-2:])
        if self.on_grid:
            found = self.decoder(self.decoder.neck(self.maps(images)))
            return found[-1] if self.predicts_masks else found
        if self.has_queries:
            return self.decoder(*self.split_queries(self.encoder.forward_features(self._pad(images)), grid))
        return self.to_grid(self.decoder(self.encode(images)), grid)

    def encode(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalized, any size -> patch tokens (B, M, D), M = gh·gw unless they are merged."""
        return self.encoder.forward_features(self._pad(images))[:, self.encoder.num_prefix_tokens :]

    def maps(self, images: Tensor) -> list[Tensor]:
        """images: (B, 3, H, W), normalized, any size -> (B, D, gh, gw) of every block that the decoder reads."""
        blocks = sorted({*self.decoder.reads})  # of few blocks, the same one may be read twice
        maps = self.encoder.forward_intermediates(self._pad(images), indices=blocks, intermediates_only=True)
        found = dict(zip(blocks, maps, strict=True))
        return [found[index] for index in self.decoder.reads]

    def grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Patches (gh, gw) of images of (height, width) pixels."""
        gh, gw = (-(-side // patch) for side, patch in zip(size, self.patch_size, strict=True))
        return gh, gw

    def _scaled(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of `grid_logits` of images of (height, width) pixels."""
        gh, gw = self.grid(size)
        return gh * self.scale, gw * self.scale

    def to_grid(self, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        """logits: (B, gh·gw, C), in row-major order -> (B, C, gh, gw), classes innermost in memory."""
        return logits.unflatten(1, grid).permute(0, 3, 1, 2)

    def forward(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalized, any size -> logits (B, n_cls, H, W)."""
        return self._to_pixels(self.grid_logits(images), images.shape[-2:])

    @property
    def has_training_outputs(self) -> bool:
        """Return whether a training step takes more than `forward` gives: auxiliary heads, or a decoder's own loss."""
        return len(self.aux_heads) > 0 or self.predicts_masks

    def training_outputs(self, images: Tensor) -> list[Any]:
        """The logits of `forward`, or the predictions that the decoder's own loss takes; then the logits of the
        auxiliary heads, (B, n_cls, H, W) each."""
        size = images.shape[-2:]
        if not self.has_training_outputs:
            return [self(images)]
        if self.has_queries:
            return [self.masked_predictions(images)]
        found = self.decoder.neck(self.maps(images))
        if self.predicts_masks:
            return [self.decoder(found)]
        return [self._to_pixels(head(found), size) for head in (self.decoder, *self.aux_heads)]

    def split_queries(self, x: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(B, Q + P + N, D) -> queries (B, Q, D) and patches (B, D, gh, gw)."""
        n_queries = self.decoder.n_queries
        return x[:, :n_queries], self.to_grid(x[:, n_queries + self.encoder.num_prefix_tokens :], grid)

    def masked_predictions(self, images: Tensor) -> list[Prediction]:
        """Predictions of the queries before every block that they are in, whose attention they mask, and at the end.

        Where tokens merge, they predict at the end alone.
        """
        grid, found = self.grid(images.shape[-2:]), []

        def mask_of(index: int, x: Tensor) -> Tensor:
            found.append(self.decoder(*self.split_queries(x, grid)))
            return self.decoder.mask(index, found[-1].masks, grid, x.shape[1])

        more = {"mask_of": mask_of} if self.mask_attention else {}
        x = self.encoder.forward_features(self._pad(images), **more)
        return [*found, self.decoder(*self.split_queries(x, grid))]

    def decode(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """tokens: (B, M, D), from `encode`; size: (height, width) of the images -> logits (B, n_cls, height, width)."""
        return self._to_pixels(self.to_grid(self.decoder(tokens), self.grid(size)), size)

    def _to_pixels(self, logits: Tensor, size: Sequence[int]) -> Tensor:
        return to_pixels(logits, size, self.patch_size)

    def predict(self, images: Tensor) -> Tensor:
        """images: (B, 3, H, W), normalized, any size -> label map (B, H, W), int64.

        Equals `self(images).argmax(1)`, but never holds the logits of the whole image.
        """
        return self.to_labels(self.network(images), images.shape[-2:])

    def to_labels(self, found: Any, size: Sequence[int]) -> Tensor:
        """Label map (B, height, width), int64, of images of this size from the output of `network`."""
        height, width = size
        if self.predicts_masks:
            return best_classes(found, self._scaled(size))[:, :height, :width]
        if any(side % self.scale for side in self.patch_size):  # no whole pixels per logit
            return self._to_pixels(found, size).argmax(1)
        stride = (self.patch_size[0] // self.scale, self.patch_size[1] // self.scale)
        return label_map(found, stride)[:, :height, :width]

    def attention(self, images: Tensor, layer_id: int, part: Literal["encoder", "decoder"] = "encoder") -> Tensor:
        """Attention weights of one layer; the ordinary forward pass never computes them.

        Args:
            images: (B, 3, H, W), normalized.
            layer_id: 0-based index of the block.
            part: "encoder" (prefix tokens first) or "decoder" (patch tokens first, then one per class).

        Returns:
            (B, heads, L, L), rows are queries and sum to 1; L counts the tokens that the layer sees.

        Raises:
            ValueError: unknown part or layer, or images that keep different numbers of tokens and are concatenated.
        """
        if part not in ("encoder", "decoder"):
            raise ValueError(f"part is {part!r}: choose encoder or decoder")
        blocks = getattr(self, part).blocks
        if not 0 <= layer_id < len(blocks):
            raise ValueError(f"layer_id {layer_id}: the {part} has {len(blocks)} layers, counted from 0")
        with recorded_attention(blocks[layer_id].attn) as record:
            self.grid_logits(images)
        if [len(weights) for weights in record] != [len(images)]:
            raise ValueError(
                f"attention of {len(images)} images that keep different numbers of tokens: give one image at a time"
            )
        return record[0]

    def _pad(self, images: Tensor) -> Tensor:
        """Zeros at the right and bottom up to whole patches."""
        missing = [-side % patch for side, patch in zip(images.shape[-2:], self.patch_size, strict=True)]
        return F.pad(images, (0, missing[1], 0, missing[0])) if any(missing) else images


def compile_blocks(blocks: Iterable[Any], backend: str = "inductor") -> None:
    """Compile attention and MLP of timm's `Block`s, patched or not, in place, once for all token counts.

    What lies between them, where a patched block merges, stays as it is; so do parameters and state-dict keys.
    """
    for block in blocks:
        for part in (block.attn, block.mlp):
            part.compile(dynamic=True, backend=backend)
