"""Learned parts of methods: built into an encoder under the published names, and only switched on by a patch."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from g2tm import kept_tokens
from patch.families import family_of
from patch.method import Method, check_layers, find

ADAPTER_WIDTH = 32  # of FPET's bottleneck
MERGE_THRESHOLD = 0.9  # where LTMP begins: at 1 it would only learn to prune


class LearnedParts(NamedTuple):
    """Learned parts in an encoder: the names of their parameters, and the options that they were built by."""

    names: tuple[str, ...]
    options: dict[str, Any]


def add_modules(encoder: nn.Module, method: str, **options: Any) -> nn.Module:
    """Build the learned parts of a method into an encoder, with initial values; nothing happens where it has none.

    Args:
        encoder: a ViT that `patch.apply` knows, not patched.
        method: a registered name.
        options: of its learned parts; None means the default.

    Returns:
        The encoder.

    Raises:
        ValueError: an unknown method or option, a value that is not allowed, parts that are there already, or an
            encoder that cannot take them.
    """
    entry = find(method)
    entry.check_names(options)
    if entry.modules is None:
        return encoder
    family = family_of(encoder)
    if not family.learns:
        raise ValueError(f"{method} has learned parts, which ViTs of timm alone can take, not {family.name}")
    family.check(encoder)
    if has_modules(encoder, method):
        raise ValueError(f"the encoder has the learned parts of {method} already")
    before = set(encoder.parameters())
    given = {name: entry.options[name].check(name, value) for name, value in options.items() if value is not None}
    built = entry.modules(encoder, family.blocks(encoder), **given)
    own = tuple(name for name, parameter in encoder.named_parameters() if parameter not in before)
    parts = LearnedParts(own, dict(given if built is None else built))
    encoder.__dict__["_learned_parts"] = _parts_of(encoder) | {method: parts}
    return encoder


def _parts_of(encoder: nn.Module) -> dict[str, LearnedParts]:
    return vars(encoder).get("_learned_parts", {})


def has_modules(encoder: nn.Module, method: str) -> bool:
    """Return whether an encoder has the learned parts of a method; True for a method without."""
    return find(method).modules is None or method in _parts_of(encoder)


def built_options(encoder: nn.Module, entry: Method, given: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a method, with those that its learned parts in an encoder were built by.

    Raises:
        ValueError: an option that contradicts them.
    """
    parts = _parts_of(encoder).get(entry.name)
    if parts is None or not entry.uses_learned(given):
        return dict(given)
    for name, value in parts.options.items():
        if given.get(name) is not None and _as_kept(given[name]) != _as_kept(value):
            raise ValueError(f"{name} {given[name]}: the learned parts of {entry.name} were built with {value}")
    return dict(given) | parts.options


def _as_kept(value: Any) -> Any:
    """Layers compare equal however they were given."""
    return [*value] if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def learned_parameters(encoder: nn.Module, method: str) -> list[nn.Parameter]:
    """The parameters of a method's learned parts in an encoder; none where there are none."""
    parts = _parts_of(encoder).get(method)
    return [] if parts is None else [encoder.get_parameter(name) for name in parts.names]


def has_unused_parts(encoder: nn.Module, method: str, layers: Collection[int]) -> bool:
    """Return whether some learned parts do nothing: those of other methods, and those of blocks that do not merge.

    method: that in force; layers: in which it merges, 1-based.
    """
    acting = tuple(f"blocks.{layer - 1}." for layer in layers)
    parts = _parts_of(encoder).items()
    return any(of != method or not name.startswith(acting) for of, own in parts for name in own.names)


def clamp_parts(encoder: nn.Module) -> None:
    """Put learned parts back into their range, after an update."""
    for module in encoder.modules():
        if isinstance(module, Threshold):
            module.clamp()


class DecoupledQKV(nn.Module):
    """The projection of an attention with an embedding beside it, by which tokens are compared (DTEM, section 3.1)."""

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


def add_embeddings(encoder: Any, blocks: Sequence[Any]) -> dict[str, Any]:
    """Give every block DTEM's embedding: as wide as a head, or twice that from a width of 1024 on."""
    if any(getattr(block.attn, "qkv", None) is None for block in blocks):
        raise ValueError("dtem needs attention with one projection for queries, keys and values: this model has three")
    for block in blocks:
        qkv, head = block.attn.qkv, block.attn.head_dim
        block.attn.qkv = DecoupledQKV(qkv, head if qkv.in_features < 1024 else 2 * head)
    return {}


class Rate(nn.Module):
    """The number of tokens that a block keeps, learned as probabilities of candidates (DiffRate, section 3.3).

    The candidates fall from the number of patches by `step` each.
    """

    kept_token_candidate: Tensor

    def __init__(self, patches: int, step: int) -> None:
        super().__init__()
        candidates = torch.arange(patches, 0, -step).float()
        self.register_buffer("kept_token_candidate", candidates)
        self.selected_probability = nn.Parameter(torch.zeros(len(candidates)))
        self._read: tuple[Any, int] = (None, patches)
        self._read_kept()

    def forward(self, n_prefix: int) -> Tensor:
        """Scalar: number of tokens, prefix tokens included; differentiable."""
        return n_prefix + kept_tokens(self.selected_probability, self.kept_token_candidate)

    @property
    def kept(self) -> int:
        """Number of patch tokens, read from the device after a change of the probabilities alone: a change that
        PyTorch counts, so not one through `.data`, which `eval()` sees. Compiled code takes what was read
        last: there, by `eval()`, or when weights were loaded."""
        logits = self.selected_probability
        if not torch.compiler.is_compiling():
            state = _state(logits)
            if state is None or state != self._read[0]:
                self._read_kept()
        return self._read[1]

    def _read_kept(self) -> None:
        logits = self.selected_probability
        if not (logits.is_meta or is_fake(logits)):  # which have no values
            self._read = _state(logits), int(kept_tokens(logits.detach(), self.kept_token_candidate))

    def train(self, mode: bool = True) -> "Rate":
        super().train(mode)
        if not mode:
            self._read_kept()
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._read_kept()


def _state(x: Tensor) -> tuple[int, int] | None:
    """Changes with the values of a tensor; None: nobody counts its changes."""
    uncounted = x.is_inference() or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return None if uncounted else (x._version, x.data_ptr())


def add_rates(encoder: Any, blocks: Sequence[Any], granularity: int = 4) -> dict[str, Any]:
    """Give every block DiffRate's two rates, for images of the encoder's own size; the first block keeps all."""
    grid = family_of(encoder).grid(encoder)
    patches = grid[0] * grid[1]
    for index, block in enumerate(blocks):
        for name in ("prune_ddp", "merge_ddp"):
            setattr(block, name, Rate(patches, granularity if index > 0 else patches).to(_device(block)))
    return {"granularity": granularity}


class Threshold(nn.Module):
    """A learned threshold (LTMP, section 3.2); value: to begin with; scale: of its learning rate."""

    def __init__(self, value: float, scale: float) -> None:
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor([value]))
        vars(self.threshold)["learning_rate_scale"] = scale

    @torch.no_grad()
    def clamp(self) -> None:
        """Put it back into 0 to 1, after an update."""
        self.threshold.clamp_(0, 1)


def add_thresholds(encoder: Any, blocks: Sequence[Any]) -> dict[str, Any]:
    """Give every block LTMP's two thresholds. Importance is a small number: its threshold learns 1,000 times slower."""
    for block in blocks:
        block.merge_masker = Threshold(MERGE_THRESHOLD, 1.0).to(_device(block))
        block.prune_masker = Threshold(0.0, 1e-3).to(_device(block))
    return {}


def add_adapters(encoder: Any, blocks: Sequence[Any], layers: int | Sequence[int] | None = None) -> dict[str, Any]:
    """Give the merging block, by default the one behind the middle, FPET's adapter; it changes nothing at first."""
    chosen = check_layers(len(blocks) // 2 + 1 if layers is None else layers, len(blocks))
    for layer in chosen:
        block = blocks[layer - 1]
        width = block.attn.head_dim
        first, last = nn.Linear(width, ADAPTER_WIDTH), nn.Linear(ADAPTER_WIDTH, width)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        block.metric_adapter = nn.Sequential(first, nn.GELU(), last).to(_device(block))
    return {"layers": [*chosen]}


class Clusterer(nn.Module):
    """Logits of the k clusters of every token by itself (ClustViT, section 3.1); logit 0: the token stays."""

    def __init__(self, width: int, hidden: int, clusters: int) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, clusters + 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, k + 1)"""
        return self.net(x)


def add_clusters(
    encoder: Any, blocks: Sequence[Any], clusters: int = 3, cluster_width: int | None = None
) -> dict[str, Any]:
    """Give an encoder ClustViT's cluster module and Regenerator."""
    width, device = encoder.embed_dim, _device(blocks[0])
    hidden = width * 129 // 32 if cluster_width is None else cluster_width
    encoder.clusterer = Clusterer(width, hidden, clusters).to(device)
    encoder.expand_mlp = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width)).to(device)
    return {"clusters": clusters, "cluster_width": hidden}


def _device(block: Any) -> torch.device:
    return next(block.parameters()).device
