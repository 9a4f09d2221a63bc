"""Learned parts of methods: built into an encoder under the published names, and only switched on by a patch."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from g2tm import kept_tokens
from patch.families import family_of
from patch.method import find

ADAPTER_WIDTH = 32  # of FPET's bottleneck
MERGE_THRESHOLD = 0.9  # where LTMP begins: at 1 it would only learn to prune


def add_modules(encoder: nn.Module, method: str, **options: Any) -> nn.Module:
    """Build the learned parts of a method into an encoder, with initial values; nothing happens where it has none.

    Args:
        encoder: a ViT that `patch.apply` knows, not patched.
        method: a registered name.
        options: of its learned parts.

    Returns:
        The encoder.

    Raises:
        ValueError: an unknown method, parts that are there already, or an encoder that cannot take them.
    """
    entry = find(method)
    if entry.modules is None:
        return encoder
    family = family_of(encoder)
    if not family.learns:
        raise ValueError(f"{method} has learned parts, which ViTs of timm alone can take, not {family.name}")
    if has_modules(encoder, method):
        raise ValueError(f"the encoder has the learned parts of {method} already")
    before = set(encoder.parameters())
    entry.modules(encoder, family.blocks(encoder), **options)
    own = tuple(name for name, parameter in encoder.named_parameters() if parameter not in before)
    encoder.__dict__["learned_parts"] = getattr(encoder, "learned_parts", {}) | {method: own}
    return encoder


def has_modules(encoder: nn.Module, method: str) -> bool:
    """Whether an encoder has the learned parts of a method; True for a method without."""
    return find(method).modules is None or method in getattr(encoder, "learned_parts", ())


def learned_parameters(encoder: nn.Module, method: str) -> list[nn.Parameter]:
    """The parameters of a method's learned parts in an encoder; none where there are none."""
    names = getattr(encoder, "learned_parts", {}).get(method, ())
    return [encoder.get_parameter(name) for name in names]


def has_resting_parts(encoder: nn.Module, method: str, layers: Collection[int]) -> bool:
    """Whether some learned parts do nothing: those of other methods, and those of blocks that do not merge.

    Args:
        encoder: with or without learned parts.
        method: that in force.
        layers: in which it merges, 1-based.
    """
    acting = [f"blocks.{layer - 1}." for layer in layers]
    parts = getattr(encoder, "learned_parts", {}).items()
    return any(of != method or not name.startswith(tuple(acting)) for of, names in parts for name in names)


def bound_parts(encoder: nn.Module) -> None:
    """Put learned parts back into their range, after an update."""
    for module in encoder.modules():
        if isinstance(module, Threshold):
            module.bound()


class DecoupledQKV(nn.Module):
    """The projection of an attention with an embedding beside it, by which tokens are compared (DTEM, section 3.1).

    Args:
        qkv: the projection, which stays as it is.
        width: of the embedding.
    """

    def __init__(self, qkv: nn.Linear, width: int) -> None:
        super().__init__()
        self.qkv_layer = qkv
        self.metric_layer = nn.Linear(qkv.in_features, width, device=qkv.weight.device, dtype=qkv.weight.dtype)

    @property
    def weight(self) -> Tensor:
        """That of the projection, which timm's `Eva` reads."""
        return self.qkv_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, L, D) -> (B, L, 3·D)"""
        return self.qkv_layer(x)


def add_embeddings(encoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Give every block DTEM's embedding: as wide as a head, or twice that from a width of 1024 on.

    Raises:
        ValueError: an attention without one projection of queries, keys and values.
    """
    if any(getattr(block.attn, "qkv", None) is None for block in blocks):
        raise ValueError("dtem needs attention with one projection for queries, keys and values: this model has three")
    for block in blocks:
        head = block.attn.head_dim
        block.attn.qkv = DecoupledQKV(block.attn.qkv, head if block.attn.qkv.in_features < 1024 else 2 * head)


class Rate(nn.Module):
    """How many tokens a block keeps, learned as probabilities of candidates (DiffRate, section 3.3).

    Args:
        patches: of an image.
        granularity: patch tokens from one candidate to the next.
        free: whether there is a choice; the first block keeps all.
    """

    def __init__(self, patches: int, granularity: int, free: bool) -> None:
        super().__init__()
        candidates = torch.arange(patches, 0, -granularity).float() if free else torch.tensor([float(patches)])
        self.register_buffer("kept_token_candidate", candidates)
        self.selected_probability = nn.Parameter(torch.zeros(len(candidates)))

    def forward(self, prefix: int) -> Tensor:
        """Scalar: number of tokens, prefix tokens included."""
        return kept_tokens(self.selected_probability, self.kept_token_candidate, prefix)


def add_rates(encoder: nn.Module, blocks: Sequence[nn.Module], granularity: int = 4) -> None:
    """Give every block DiffRate's two rates, for images of the encoder's own size."""
    grid = family_of(encoder).grid(encoder)
    for index, block in enumerate(blocks):
        for name in ("prune_ddp", "merge_ddp"):
            setattr(block, name, Rate(grid[0] * grid[1], granularity, free=index > 0).to(_device(block)))


class Threshold(nn.Module):
    """A learned threshold (LTMP, section 3.2).

    Args:
        value: to begin with.
        scale: of its learning rate.
    """

    def __init__(self, value: float, scale: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor([value]))
        self.threshold.learning_rate_scale = scale

    @torch.no_grad()
    def bound(self) -> None:
        """Back to 0 to 1, after an update."""
        self.threshold.clamp_(0, 1)


def add_thresholds(encoder: nn.Module, blocks: Sequence[nn.Module]) -> None:
    """Give every block LTMP's two thresholds. Importance is a small number: its threshold learns 1,000 times slower."""
    for block in blocks:
        block.merge_masker = Threshold(MERGE_THRESHOLD, 1.0).to(_device(block))
        block.prune_masker = Threshold(0.0, 1e-3).to(_device(block))


def add_adapters(encoder: nn.Module, blocks: Sequence[nn.Module], layers: Sequence[int] | None = None) -> None:
    """Give the merging block, by default the one behind the middle, FPET's adapter; it changes nothing at first."""
    for layer in layers or [len(blocks) // 2 + 1]:
        block: Any = blocks[layer - 1]
        width = block.attn.head_dim
        adapter = nn.Sequential(nn.Linear(width, ADAPTER_WIDTH), nn.GELU(), nn.Linear(ADAPTER_WIDTH, width))
        nn.init.zeros_(adapter[2].weight)
        nn.init.zeros_(adapter[2].bias)
        block.metric_adapter = adapter.to(_device(block))


class Clusterer(nn.Module):
    """Logits of the clusters of every token by itself (ClustViT, section 3.1).

    Args:
        width: D.
        hidden: H.
        clusters: k; logit 0 stands for a token that stays.
    """

    def __init__(self, width: int, hidden: int, clusters: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, clusters + 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, k + 1)"""
        return self.net(x)


def add_clusters(
    encoder: nn.Module, blocks: Sequence[nn.Module], clusters: int = 3, cluster_width: int | None = None
) -> None:
    """Give an encoder ClustViT's cluster module and Regenerator."""
    model: Any = encoder
    width = model.embed_dim
    hidden = cluster_width or width * 129 // 32
    model.clusterer = Clusterer(width, hidden, clusters).to(_device(blocks[0]))
    expand = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))
    model.expand_mlp = expand.to(_device(blocks[0]))


def _device(block: nn.Module) -> torch.device:
    return next(block.parameters()).device
