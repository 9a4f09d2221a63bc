"""Single steps of merging methods, and their training forms, against vectors."""

import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from conformance_common import MODEL, Cases, Vectors, exactly, same, same_partition, with_cls
from conformance_common import Case as Case
from torch import Tensor

import g2tm
from g2tm import Grouping


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


def _patches(v: Vectors, name: str) -> Tensor:
    """(B, N + 1, ...) -> (B, N, ...), without CLS."""
    return v[name][:, 1:]


def _sizes(v: Vectors, source: str) -> Tensor:
    """(B, N)"""
    return v.sizes(f"{source}.size")[:, 1:]


def _step(v: Vectors, case: str, source: str, step: Any) -> None:
    """Order, values and sizes of a reduction of the patch tokens; CLS stays in front as it is."""
    _assigned(v, case, step)
    same("x", with_cls(v[f"{source}.x"], step.merge(_patches(v, f"{source}.x"))), v[f"{case}.x"])
    same("the size", with_cls(v.sizes(f"{source}.size"), step.sizes), v.sizes(f"{case}.size"))


def _assigned(v: Vectors, case: str, step: Any) -> None:
    exactly("the assignment", with_cls(0, 1 + step.assignment), v[f"{case}.assignment"])


def _tofu(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    x = v[f"{source}.x"]
    for prune, values in ((True, "pruned"), (False, "merged")):
        rule = {"r": given["r"], "prune": prune, "sizes": _sizes(v, source)}
        step = g2tm.tofu(_patches(v, f"{source}.metric"), **rule)
        _assigned(v, case, step)
        same(values, with_cls(x, step.merge(x[:, 1:])), v[f"{case}.{values}"])
        same("the size", with_cls(v.sizes(f"{source}.size"), step.sizes), v.sizes(f"{case}.size"))


def _pitome(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    _step(v, case, source, g2tm.pitome(_patches(v, f"{source}.metric"), sizes=_sizes(v, source), **given))


def _mctf(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    rule = {"r": given["r"], "tau": given["tau"], "bidirectional": given["bidirection"]}
    importance = v[f"{source}.attn"].mean((1, 2))[:, 1:]
    x = _patches(v, f"{source}.metric")
    _step(v, case, source, g2tm.mctf(x, importance=importance, sizes=_sizes(v, source), **rule))


def _crossget(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    importance = _patches(v, f"{source}.importance") if given["importance"] else None
    rule = {"r": given["r"], "importance": importance, "suffix": int(given["last"])}
    _step(v, case, source, g2tm.crossget(_patches(v, f"{source}.metric"), sizes=_sizes(v, source), **rule))


def _fpet(v: Vectors, case: str, source: str, given: dict[str, Any]) -> None:
    rows, columns = re.search(r"\.g(\d+)x(\d+)", case).groups()
    grid, metric = (int(rows), int(columns)), v[f"{source}.metric"].clone().requires_grad_()
    _step(v, case, source, g2tm.fpet(metric[:, 1:], grid, sizes=_sizes(v, source)))
    step = g2tm.fpet_training(metric[:, 1:], grid, sizes=_sizes(v, source))
    _step(v, case, source, step)
    if f"{case}.metric_grad" in v:
        merged = with_cls(v[f"{source}.x"], step.merge(_patches(v, f"{source}.x")))
        (merged * v[f"{source}.cotangent"]).sum().backward()
        same("the gradient of the metric", metric.grad, v[f"{case}.metric_grad"], MODEL, relative=True)


def _cls_attention(v: Vectors, source: str) -> Tensor:
    """(B, N), attention of CLS to the patches."""
    return v[f"{source}.attn"][:, :, 0, 1:].mean(1)


def _diffrate(v: Vectors, case: str, source: str, kept: str, merged: str) -> None:
    given = {"importance": _cls_attention(v, source), "kept": int(kept) - 1, "merged": int(merged) - 1}
    _step(v, case, source, g2tm.diffrate(_patches(v, f"{source}.x"), sizes=_sizes(v, source), **given))


def candidates_of(v: Vectors, logits: Tensor, patches: int) -> Tensor:
    """The numbers of patches that a learned rate chooses from; one logit: all of them.

    Raises:
        DoesNotHoldError: several distances of candidates give so many logits, and the file does not say which.
    """
    fitting = [step for step in range(1, patches + 1) if math.ceil(patches / step) == len(logits)]
    known = v.numbers("granularity") or [
        int(-step) for step in v.get("diffrate.rate.candidates", logits[:0]).diff()[:1]
    ]
    fitting = [step for step in fitting if step in known] or fitting
    if len(logits) == 1:
        return torch.tensor([float(patches)])
    if len(fitting) != 1:
        raise v.lacks("granularity")
    return torch.arange(patches, 0, -fitting[0]).float()


def _diffrate_rate(v: Vectors, case: str) -> None:
    logits, choice = v[f"{case}.logits"].clone().requires_grad_(), v[f"{case}.candidates"]
    kept, expected = g2tm.kept_tokens(logits, choice), v[f"{case}.mask"]
    same("the number of tokens", 1 + kept, v[f"{case}.kept"])
    same("its gradient", torch.autograd.grad(kept, logits)[0], v[f"{case}.kept_grad"], MODEL, relative=True)
    mask = g2tm.rate_mask(logits, choice, int(kept), int(v[f"{case}.tokens_now"]) - 1, len(expected) - 1)
    same("the mask", with_cls(1.0, mask[None]), expected[None])
    (gradient,) = torch.autograd.grad((mask * v[f"{case}.mask_cotangent"][1:]).sum(), logits)
    same("its gradient", gradient, v[f"{case}.mask_grad"], MODEL, relative=True)


PATCH_SIZES, CLASSES = (8, 14, 16, 32), (0, 10, 100, 1000, 21841)  # of usual models


def operations(
    v: Vectors, case: str, expected: Tensor, counts: list[Sequence[Tensor]], width: int, patches: int | None = None
) -> Tensor:
    """10⁹ operations of the model that a case is about.

    A file tells its patches, their size and the classes, as tensors of the case or in the header. Of what it does not
    tell, that usual value is taken which comes nearest to the expected number of operations.

    Args:
        expected: that number.
        counts: after pruning and after merging, CLS included.
        patches: None: the file tells them, or the grid is a square.
    """

    def told(name: str, usual: Iterable[int]) -> Iterable[int]:
        return [int(v[f"{case}.{name}"])] if f"{case}.{name}" in v else v.numbers(name) or usual

    most = max(math.ceil(max(float(count.detach()) for count in kind)) for kind in counts) - 1
    squares = [side**2 for side in range(math.isqrt(most - 1) + 1, 2 * math.isqrt(most) + 2)]
    models = itertools.product(
        [patches] if patches else told("patches", squares), told("patch_size", PATCH_SIZES), told("classes", CLASSES)
    )
    found = [
        g2tm.gigaflops(*counts, length=1 + n, width=width, patch_size=side, classes=classes)
        for n, side, classes in models
    ]
    return min(found, key=lambda value: abs(float(value.detach()) - float(expected)))


def _diffrate_flops(v: Vectors, case: str) -> None:
    counts = [v[f"{case}.{kind}_kept"].float().clone().requires_grad_() for kind in ("prune", "merge")]
    width = [int(v[f"{case}.width"])] if f"{case}.width" in v else v.numbers("width")
    if not width:
        raise v.lacks("width")
    found = operations(v, case, v[f"{case}.gflops"], list(map(list, counts)), width[0])
    same("GFLOPs", found, v[f"{case}.gflops"])
    for kind, gradient in zip(("prune", "merge"), torch.autograd.grad(found, counts), strict=True):
        same(f"the gradient of {kind}", gradient, v[f"{case}.{kind}_grad"], MODEL, relative=True)


def _diffrate_train(v: Vectors, case: str, source: str) -> None:
    x = _patches(v, f"{source}.x")
    logits = {kind: v[f"{case}.{kind}_logits"].clone().requires_grad_() for kind in ("prune", "merge")}
    rates = {kind: (value, candidates_of(v, value, x.shape[1])) for kind, value in logits.items()}
    step = g2tm.diffrate_training(x, importance=_cls_attention(v, source), sizes=_sizes(v, source), **rates)
    for kind, rate in rates.items():
        same(f"the tokens of {kind}", 1 + g2tm.kept_tokens(*rate), v[f"{case}.{kind}_kept"])
    same("x", with_cls(v[f"{source}.x"], step.merge(x)), v[f"{case}.x"])
    same("the size", with_cls(v.sizes(f"{source}.size"), step.sizes), v.sizes(f"{case}.size"))
    same("the mask", with_cls(1.0, step.mask), v[f"{case}.mask"])
    cotangent = _patches(v, f"{case}.mask_cotangent")
    gradients = torch.autograd.grad((step.mask * cotangent).sum(), list(logits.values()))
    for kind, gradient in zip(logits, gradients, strict=True):
        same(f"the gradient of {kind}", gradient, v[f"{case}.{kind}_grad"], MODEL, relative=True)


def _dct(v: Vectors, case: str, source: str, r: str) -> None:
    x = v[f"{source}.x"]
    step = g2tm.dct(x[:, 1:], r=int(r))
    merged = step.merge(x[:, 1:])
    same("x", with_cls(x, merged), v[f"{case}.x"])
    same("the way back", with_cls(x, step.unmerge(merged)), v[f"{case}.restored"])


def _atc(v: Vectors, case: str, source: str, clusters: str, linkage: str) -> None:
    x, sizes = v[f"{source}.x"], v.sizes(f"{source}.size")
    rule = {"clusters": int(clusters), "linkage": linkage}
    step = g2tm.atc(_patches(v, f"{source}.metric"), sizes=sizes[:, 1:], **rule)
    expected = v[f"{case}.assignment"]
    same_partition("the clustering", with_cls(0, 1 + step.assignment), expected)
    exactly("the place of CLS", torch.zeros_like(expected[:, :1]), expected[:, :1])
    back = with_cls(x, step.unmerge(step.merge(x[:, 1:])))
    same("x", back, v[f"{case}.x"].gather(1, expected.unsqueeze(2).expand_as(x)))
    found = with_cls(sizes, step.sizes.gather(1, step.assignment))
    same("the size", found, v.sizes(f"{case}.size").gather(1, expected))


def _metric(v: Vectors, source: str) -> Tensor:
    return g2tm.embed(v[f"{source}.h"], v["dtem.weight"], v["dtem.bias"])


def _dtem(v: Vectors, case: str, source: str, r: str) -> None:
    _step(v, case, source, g2tm.bipartite(_metric(v, source)[:, 1:], r=int(r), sizes=_sizes(v, source)))


def _dtem_train(v: Vectors, case: str, _: str) -> None:
    source = f"n{v[f'{case}.x'].shape[1]}"
    metric = _metric(v, source).detach().requires_grad_()
    given: dict[str, Any] = {"r": int(v[f"{case}.r"]), "inverse_temperature": float(v[f"{case}.inverse_temperature"])}
    given |= {name: v[f"{case}.{name}"] - 1 for name in ("a_index", "b_index")}
    step = g2tm.soft_merge(metric[:, 1:], sizes=_sizes(v, source), **given)
    merged = with_cls(v[f"{source}.x"], step.merge(_patches(v, f"{source}.x")))
    sizes = with_cls(v.sizes(f"{source}.size"), step.sizes)
    same("the shares", step.shares, v[f"{case}.assign"])
    same("x", merged, v[f"{case}.x"])
    same("the size", sizes, v.sizes(f"{case}.size"))
    loss = (merged * v[f"{case}.x_cotangent"]).sum() + (sizes * v.sizes(f"{case}.size_cotangent")).sum()
    (gradient,) = torch.autograd.grad(loss, metric)
    same("the gradient of the metric", gradient, v[f"{case}.metric_grad"], MODEL, relative=True)


def _ltmp(v: Vectors, case: str, source: str, _: str) -> None:
    given: dict[str, Any] = {name: float(v[f"{case}.{name}"]) for name in ("merge_threshold", "prune_threshold")}
    given |= {"importance": v[f"{source}.attn"].mean((1, 2))[:, 1:], "fewest": 0, "sizes": _sizes(v, source)}
    step = g2tm.ltmp(_patches(v, f"{source}.x"), _patches(v, f"{source}.metric"), **given)
    exactly("the number of tokens", 1 + step.counts, v[f"{case}.count"])
    _step(v, case, source, step)


def _ltmp_masker(v: Vectors, case: str) -> None:
    values, threshold = (v[f"{case}.{name}"].clone().requires_grad_() for name in ("values", "threshold"))
    mask = g2tm.above(values, threshold, float(v[f"{case}.tau"]))
    same("the mask", mask, v[f"{case}.mask"])
    gradients = torch.autograd.grad((mask * v[f"{case}.cotangent"]).sum(), (values, threshold))
    for name, gradient in zip(("values", "threshold"), gradients, strict=True):
        same(f"the gradient of the {name}", gradient, v[f"{case}.{name}_grad"], MODEL, relative=True)


def _tome(v: Vectors, case: str, r: str) -> None:
    step: Grouping = g2tm.bipartite(_patches(v, "tome.metric"), r=int(r), sizes=_sizes(v, "tome"))
    _step(v, case, "tome", step)
    x = v["tome.x"]
    same("the way back", with_cls(x, step.unmerge(step.merge(x[:, 1:]))), v[f"{case}.unmerged"])


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
