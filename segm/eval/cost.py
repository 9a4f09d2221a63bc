"""Costs of models: operations, tokens, and the speed of several models inside one run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from patch.operations import count_operations
from patch.trials import interleaved_trials, ratio, realized_share, speed
from segm.merging import PURE, count_tokens, method_of
from segm.model.segmenter import Segmenter


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
        `gflops_decoder`; `images_per_second` of `predict`, `speedup` over that of `reference`;
        `images_per_second_scores` of token scores, `realized_share` of `reference`.
    """

    def on_batch(function: Callable[[Tensor], Any], name: str) -> Callable[[list[int]], Any]:
        return lambda index: function(batches[name][index[0]])  # `interleaved_trials` passes the number of a batch

    calls = {(name, "labels"): on_batch(model.predict, name) for name, model in models.items()}
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
            "speedup": ratio(trials[name, "labels"], trials[reference, "labels"]),
            "images_per_second_scores": size * speed(scores),
            "realized_share": realized_share(scores, pure_scores, own.network, pure.network),
            "reference": reference,
            "counts": list(own.counts),
        }
    return rows
