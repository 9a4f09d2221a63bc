"""Single steps of merging methods, and their training forms, against vectors."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from conformance_common import MODEL, Cases, Vectors, exactly, same, same_partition
from conformance_common import Case as Case
from torch import Tensor

import g2tm
from g2tm import Grouping

GRANULARITY = 4  # of DiffRate's candidates in the vectors


def cases(vectors: Vectors) -> Cases:
    """All cases of single steps in a file, in the order of their names."""
    found: dict[str, tuple[str, Callable[[], None]]] = {}
    named = {name.split(".")[0] for name in vectors}
    if named & WITH_HEADER.keys() and not vectors.parameters:
        raise ValueError(
            f"{vectors.file}: the header lacks `cases`, the parameters of {', '.join(named & WITH_HEADER.keys())}"
        )
    for name, parameters in vectors.parameters.items():
        family = name.split(".")[0]
        if family in WITH_HEADER:
            found[name] = family, partial(WITH_HEADER[family], vectors, name, name.split(".")[1], parameters)
    for name in vectors:
        for family, pattern, check in BY_NAME:
            match = re.fullmatch(pattern, name)
            if match:
                case = name.rpartition(".")[0]
                found[case] = family, partial(check, vectors, case, *match.groups())
    for name in sorted(found):
        yield Case(found[name][0], name, found[name][1])


def _step(v: Vectors, case: str, source: str, step: Any) -> None:
    """Order, values and sizes of a reduction of the whole sequence."""
    exactly("the assignment", step.assignment, v[f"{case}.assignment"])
    same("x", step.merge(v[f"{source}.x"]), v[f"{case}.x"])
    same("the size", step.sizes, v.sizes(f"{case}.size"))


def _tofu(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    for prune, values in ((True, "pruned"), (False, "merged")):
        step = g2tm.tofu(v[f"{source}.metric"], r=given["r"], prune=prune, sizes=v.sizes(f"{source}.size"))
        exactly("the assignment", step.assignment, v[f"{case}.assignment"])
        same(values, step.merge(v[f"{source}.x"]), v[f"{case}.{values}"])
        same("the size", step.sizes, v.sizes(f"{case}.size"))


def _pitome(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    _step(v, case, source, g2tm.pitome(v[f"{source}.metric"], sizes=v.sizes(f"{source}.size"), **given))


def _mctf(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    rule = {"r": given["r"], "tau": given["tau"], "bidirectional": given["bidirection"]}
    means = v[f"{source}.attn"].mean((1, 2))
    step = g2tm.mctf(v[f"{source}.metric"], importance=means, sizes=v.sizes(f"{source}.size"), **rule)
    _step(v, case, source, step)


def _crossget(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    importance = v[f"{source}.importance"] if given["importance"] else None
    rule = {"r": given["r"], "importance": importance, "suffix": int(given["last"])}
    _step(v, case, source, g2tm.crossget(v[f"{source}.metric"], sizes=v.sizes(f"{source}.size"), **rule))


def _fpet(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    rows, columns = re.search(r"\.g(\d+)x(\d+)", case).groups()
    grid, metric = (int(rows), int(columns)), v[f"{source}.metric"].clone().requires_grad_()
    _step(v, case, source, g2tm.fpet(metric, grid, sizes=v.sizes(f"{source}.size")))
    step = g2tm.fpet_training(metric, grid, sizes=v.sizes(f"{source}.size"))
    _step(v, case, source, step)
    if f"{case}.metric_grad" in v:
        (step.merge(v[f"{source}.x"]) * v[f"{source}.cotangent"]).sum().backward()
        same("the gradient of the metric", metric.grad, v[f"{case}.metric_grad"], MODEL, relative=True)


def _diffrate(v: Vectors, case: str, source: str, kept: str, merged: str) -> None:
    given = {"importance": v[f"{source}.attn"][:, :, 0].mean(1), "kept": int(kept), "merged": int(merged)}
    _step(v, case, source, g2tm.diffrate(v[f"{source}.x"], sizes=v.sizes(f"{source}.size"), **given))


def candidates_of(logits: Tensor, patches: int) -> Tensor:
    """The numbers of patches that a learned rate chooses from; one logit: all of them."""
    if len(logits) == 1:
        return torch.tensor([float(patches)])
    usual = torch.arange(patches, 0, -GRANULARITY)
    step = GRANULARITY if len(usual) == len(logits) else math.ceil(patches / len(logits))
    return torch.arange(patches, 0, -step).float()


def _diffrate_rate(v: Vectors, case: str) -> None:
    logits, choice = v[f"{case}.logits"].clone().requires_grad_(), v[f"{case}.candidates"]
    kept = g2tm.kept_tokens(logits, choice, 1)
    same("the number of tokens", kept, v[f"{case}.kept"])
    same("its gradient", torch.autograd.grad(kept, logits)[0], v[f"{case}.kept_grad"], MODEL, relative=True)
    mask = g2tm.rate_mask(logits, choice, int(kept), int(v[f"{case}.tokens_now"]), len(v[f"{case}.mask"]), 1)
    same("the mask", mask, v[f"{case}.mask"])
    (gradient,) = torch.autograd.grad((mask * v[f"{case}.mask_cotangent"]).sum(), logits)
    same("its gradient", gradient, v[f"{case}.mask_grad"], MODEL, relative=True)


def _diffrate_flops(v: Vectors, case: str) -> None:
    counts = [v[f"{case}.{kind}_kept"].float().clone().requires_grad_() for kind in ("prune", "merge")]
    width = int(v[f"{case}.width"]) if f"{case}.width" in v else 384
    found = g2tm.gigaflops(*map(list, counts), patches=196, width=width, classes=1000)  # as the format says
    same("GFLOPs", found, v[f"{case}.gflops"])
    for kind, gradient in zip(("prune", "merge"), torch.autograd.grad(found, counts), strict=True):
        same(f"the gradient of {kind}", gradient, v[f"{case}.{kind}_grad"], MODEL, relative=True)


def _diffrate_train(v: Vectors, case: str, source: str) -> None:
    x, n_tokens = v[f"{source}.x"], v[f"{source}.x"].shape[1]
    logits = {kind: v[f"{case}.{kind}_logits"].clone().requires_grad_() for kind in ("prune", "merge")}
    rates = {kind: (value, candidates_of(value, n_tokens - 1)) for kind, value in logits.items()}
    given = {"importance": v[f"{source}.attn"][:, :, 0].mean(1), "mask": torch.ones(x.shape[:2])}
    step = g2tm.diffrate_training(x, sizes=v.sizes(f"{source}.size"), **given, **rates)
    for kind, rate in rates.items():
        same(f"the tokens of {kind}", g2tm.kept_tokens(*rate, 1), v[f"{case}.{kind}_kept"])
    same("x", step.merge(x), v[f"{case}.x"])
    same("the size", step.sizes, v.sizes(f"{case}.size"))
    same("the mask", step.mask, v[f"{case}.mask"])
    gradients = torch.autograd.grad((step.mask * v[f"{case}.mask_cotangent"]).sum(), list(logits.values()))
    for kind, gradient in zip(logits, gradients, strict=True):
        same(f"the gradient of {kind}", gradient, v[f"{case}.{kind}_grad"], MODEL, relative=True)


def _dct(v: Vectors, case: str, source: str, r: str) -> None:
    x = v[f"{source}.x"]
    step = g2tm.dct(x[:, 1:], r=int(r))
    merged = step.merge(x[:, 1:])
    same("x", torch.cat([x[:, :1], merged], 1), v[f"{case}.x"])
    same("the way back", torch.cat([x[:, :1], step.unmerge(merged)], 1), v[f"{case}.restored"])


def _atc(v: Vectors, case: str, source: str, clusters: str, linkage: str) -> None:
    x, sizes = v[f"{source}.x"], v.sizes(f"{source}.size")[:, 1:]
    step = g2tm.atc(v[f"{source}.metric"][:, 1:], clusters=int(clusters), linkage=linkage, sizes=sizes)
    expected = v[f"{case}.assignment"]
    same_partition("the clustering", step.assignment, expected[:, 1:])
    back = torch.cat([x[:, :1], step.unmerge(step.merge(x[:, 1:]))], 1)
    same("x", back, v[f"{case}.x"].gather(1, expected.unsqueeze(2).expand_as(x)))
    same("the size", step.sizes.gather(1, step.assignment), v.sizes(f"{case}.size").gather(1, expected)[:, 1:])


def _metric(v: Vectors, source: str) -> Tensor:
    return g2tm.embed(v[f"{source}.h"], v["dtem.weight"], v["dtem.bias"])


def _dtem(v: Vectors, case: str, source: str, r: str) -> None:
    _step(v, case, source, g2tm.bipartite(_metric(v, source), r=int(r), sizes=v.sizes(f"{source}.size")))


def _dtem_train(v: Vectors, case: str, _: str) -> None:
    n_tokens = v[f"{case}.x"].shape[1]
    source = f"n{n_tokens}"
    metric = _metric(v, source).detach().requires_grad_()
    given: dict[str, Any] = {"r": int(v[f"{case}.r"]), "inverse_temperature": float(v[f"{case}.inverse_temperature"])}
    given |= {name: v[f"{case}.{name}"] for name in ("a_index", "b_index")}
    step = g2tm.soft_merge(metric, sizes=v.sizes(f"{source}.size"), **given)
    merged = step.merge(v[f"{source}.x"])
    same("the shares", step.shares, v[f"{case}.assign"])
    same("x", merged, v[f"{case}.x"])
    same("the size", step.sizes, v.sizes(f"{case}.size"))
    loss = (merged * v[f"{case}.x_cotangent"]).sum() + (step.sizes * v.sizes(f"{case}.size_cotangent")).sum()
    (gradient,) = torch.autograd.grad(loss, metric)
    same("the gradient of the metric", gradient, v[f"{case}.metric_grad"], MODEL, relative=True)


def _ltmp(v: Vectors, case: str, source: str, _: str) -> None:
    given: dict[str, Any] = {name: float(v[f"{case}.{name}"]) for name in ("merge_threshold", "prune_threshold")}
    given |= {"importance": v[f"{source}.attn"].mean((1, 2)), "fewest": 0}
    step = g2tm.ltmp(v[f"{source}.x"], v[f"{source}.metric"], sizes=v.sizes(f"{source}.size"), **given)
    exactly("the number of tokens", step.counts, v[f"{case}.count"])
    _step(v, case, source, step)


def _ltmp_masker(v: Vectors, case: str) -> None:
    values, threshold = (v[f"{case}.{name}"].clone().requires_grad_() for name in ("values", "threshold"))
    mask = g2tm.above(values, threshold, float(v[f"{case}.tau"]))
    same("the mask", mask, v[f"{case}.mask"])
    gradients = torch.autograd.grad((mask * v[f"{case}.cotangent"]).sum(), (values, threshold))
    for name, gradient in zip(("values", "threshold"), gradients, strict=True):
        same(f"the gradient of the {name}", gradient, v[f"{case}.{name}_grad"], MODEL, relative=True)


def _tome(v: Vectors, case: str, r: str) -> None:
    step: Grouping = g2tm.bipartite(v["tome.metric"], r=int(r), sizes=v.sizes("tome.size"))
    _step(v, case, "tome", step)
    same("the way back", step.unmerge(step.merge(v["tome.x"])), v[f"{case}.unmerged"])


WITH_HEADER: dict[str, Callable[..., None]] = {
    "tofu": _tofu,
    "pitome": _pitome,
    "mctf": _mctf,
    "crossget": _crossget,
    "fpet": _fpet,
}
BY_NAME: tuple[tuple[str, str, Callable[..., None]], ...] = (
    ("tome", r"tome\.r(\d+)\.x", _tome),
    ("diffrate", r"diffrate\.(n\d+)\.p(\d+)\.m(\d+)\.x", _diffrate),
    ("diffrate", r"diffrate\.rate\.logits", _diffrate_rate),
    ("diffrate", r"diffrate\.flops\.gflops", _diffrate_flops),
    ("diffrate, training", r"diffrate\.train\.(n\d+)\.x", _diffrate_train),
    ("dct", r"dct\.(n\d+)\.r(\d+)\.x", _dct),
    ("atc", r"atc\.(n\d+)\.k(\d+)\.(\w+)\.x", _atc),
    ("dtem", r"dtem\.(n\d+)\.r(\d+)\.x", _dtem),
    ("dtem, training", r"dtem\.train\.(\w+)\.x", _dtem_train),
    ("ltmp", r"ltmp\.(n\d+)\.(\w+)\.x", _ltmp),
    ("ltmp, training", r"ltmp\.masker\.mask", _ltmp_masker),
)
