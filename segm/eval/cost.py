"""Costs of models: operations, tokens, and the speed of several models inside one run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop
from tqdm import tqdm

from segm.eval.timing import interleaved_trials, realized_share, speed
from segm.merging import PURE, count_tokens, method_of
from segm.model.segmenter import Segmenter

aten = torch.ops.aten


@dataclass(frozen=True)
class Operations:
    """10⁹ operations of one forward pass per image, one per multiply-add.

    Attributes:
        total: all of them.
        encoder, decoder: those of the two parts; merging is part of the encoder, its undoing of the decoder. The rest
            is upsampling, and the weighing of masks by their classes.
        uncounted: operator -> number of its calls that do not count: element-wise work, sorting, indexing.
    """

    total: float
    encoder: float
    decoder: float
    uncounted: Mapping[str, int]


def count_operations(model: nn.Module, images: Tensor) -> Operations:
    """Operations of one forward pass; for a merging model the count depends on the images.

    PyTorch's formulas give matrix products, convolutions and fused attention. As fvcore does, norms count 5 per number
    (batch norms 2) and bilinear interpolation 4 per pixel. The similarities of neighbors and the sums of the merge
    count one per number. Connected components are searched outside PyTorch and do no arithmetic.

    Args:
        model: a Segmenter or a ViT, patched or not.
        images: (B, 3, H, W). Where no image decides what is computed, model and images may be on the device "meta".

    Returns:
        `Operations` per image, upsampling included. A ViT without a decoder is all encoder.
    """
    counter = _OperationCounter()
    decoder = getattr(model, "decoder", None)
    parts = [part for part in (decoder, getattr(decoder, "neck", None)) if isinstance(part, nn.Module)]
    with torch.inference_mode(), ExitStack() as stack:
        for part in parts:
            stack.enter_context(part.register_forward_pre_hook(lambda *_: counter.enter("decoder")))
            stack.enter_context(part.register_forward_hook(lambda *_: counter.enter("rest")))
        stack.enter_context(counter)
        model(images)
    found = {part: count / len(images) / 1e9 for part, count in counter.operations.items()}
    uncounted = dict(sorted(counter.uncounted.items()))
    return Operations(sum(found.values()), found.get("encoder", 0.0), found.get("decoder", 0.0), uncounted)


class _OperationCounter(TorchDispatchMode):
    """While open, counts the operations of a model: those before its decoder, in it, and after it."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.uncounted: Counter[str] = Counter()
        self.part = "encoder"

    def enter(self, part: str) -> None:
        """From now on "decoder" runs, or the "rest"."""
        self.part = part

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, operator = kwargs or {}, func.overloadpacket
        if operator not in FORMULAS:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if operator in FORMULAS:
            self.operations[self.part] += FORMULAS[operator](*args, **kwargs, out_val=result)
        elif not func.is_view:
            self.uncounted[operator.__name__] += 1
        return result


def _library(formula: Callable[..., int]) -> Callable[..., int]:
    """PyTorch's formula, which counts two per multiply-add."""
    return lambda *args, **kwargs: formula(*args, **kwargs) // 2


def _per_number(position: int, factor: int = 1) -> Callable[..., int]:
    """So many operations per number of an argument."""
    return lambda *args, **_: factor * args[position].numel()


FORMULAS: dict[Any, Callable[..., int]] = {
    **{operator: _library(formula) for operator, formula in flop_registry.items()},
    aten._scaled_dot_product_flash_attention_for_cpu: _library(sdpa_flop),
    **dict.fromkeys((aten.native_layer_norm, aten.native_group_norm), _per_number(0, 5)),
    **dict.fromkeys((aten.native_batch_norm, aten.cudnn_batch_norm), _per_number(0, 2)),
    aten._native_batch_norm_legit_no_training: _per_number(0, 2),
    **dict.fromkeys((aten._adaptive_avg_pool2d, aten.linalg_vecdot), _per_number(0)),
    **dict.fromkeys((aten.index_add, aten.index_add_, aten.scatter_add, aten.scatter_add_), _per_number(3)),
    aten.upsample_bilinear2d: lambda *_, out_val, **__: 4 * out_val.numel(),
    aten.upsample_nearest2d: lambda *_, out_val, **__: out_val.numel(),
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    FORMULAS[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: x.numel() * weight.shape[0]


@dataclass(frozen=True)
class Cost:
    """The operations and tokens of a model, mean over batches; 10⁹ operations per image, one per multiply-add.

    Attributes:
        total: all operations, upsampling included.
        encoder, decoder: those of the two parts.
        counts: patch tokens that each image keeps.
    """

    total: float
    encoder: float
    decoder: float
    counts: tuple[int, ...]

    @classmethod
    def of(cls, model: Segmenter, batches: Sequence[Tensor]) -> "Cost":
        """Count; without merging all batches of one shape cost the same, and only the first is counted."""
        merges = method_of(model) != PURE
        counted = batches if merges else [batches[0]]
        found = [count_operations(model, batch) for batch in counted]
        total, encoder, decoder = (
            sum(getattr(one, part) for one in found) / len(found) for part in ("total", "encoder", "decoder")
        )
        counts = torch.cat([count_tokens(model, batch) for batch in counted]).tolist()
        return cls(total, encoder, decoder, tuple(counts if merges else counts[:1] * sum(map(len, batches))))

    @property
    def network(self) -> float:
        """Operations of encoder and decoder."""
        return self.encoder + self.decoder

    @property
    def tokens(self) -> float:
        """Mean of the counts."""
        return sum(self.counts) / len(self.counts)


def compare(
    models: Mapping[str, Segmenter],
    references: Mapping[str, str],
    batches: Mapping[str, Sequence[Tensor]],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Speed and cost of models on images, one batch at a time, all interleaved.

    Args:
        models: name -> model, unpatched references included.
        references: name -> name of the unpatched model that it is compared with, for the models that are asked for.
        batches: name -> the batches that it is fed; a model and its reference share theirs.
        device: where models and batches are.

    Returns:
        name -> dict: `tokens` (mean) of `n_patches`, `counts` (of every image); `gflops`, `gflops_encoder`,
        `gflops_decoder`; `images_per_second` of `predict`, `images_per_second_scores` of token scores;
        `realized_share` of `reference`.
    """

    def on_batch(function: Callable[[Tensor], Any], name: str) -> Callable[[list[int]], Any]:
        return lambda index: function(batches[name][index[0]])  # `interleaved_trials` passes the number of a batch

    calls = {(name, "labels"): on_batch(models[name].predict, name) for name in references}
    calls |= {(name, "scores"): on_batch(model.network, name) for name, model in models.items()}
    n_batches = min(len(batches[name]) for name in models)
    trials = interleaved_trials(calls, [[index] for index in range(n_batches)], device, warm=True, progress=True)
    bar = tqdm(models.items(), desc="operations", unit="run", leave=False)
    costs = {name: Cost.of(model, batches[name]) for name, model in bar}
    rows = {}
    for name, reference in references.items():
        own, pure, size = costs[name], costs[reference], len(batches[name][0])
        scores, pure_scores = trials[name, "scores"], trials[reference, "scores"]
        rows[name] = {
            "tokens": own.tokens,
            "n_patches": pure.counts[0],
            "gflops": own.total,
            "gflops_encoder": own.encoder,
            "gflops_decoder": own.decoder,
            "images_per_second": size * speed(trials[name, "labels"]),
            "images_per_second_scores": size * speed(scores),
            "realized_share": realized_share(scores, pure_scores, own.network, pure.network),
            "reference": reference,
            "counts": list(own.counts),
        }
    return rows
