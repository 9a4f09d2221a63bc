"""The small Segmenter of the released format, plain and merged, against vectors."""

import re
from collections.abc import Callable
from functools import partial

from conformance_common import MODEL, Case, Cases, Vectors, exactly, same, same_partition

import patch
from segm.eval.sliding import Windows, view_logits
from segm.model.factory import load_model
from segm.model.segmenter import Segmenter

ATTENTION = {"none": "none", "prop": "proportional", "iprop": "inverse"}
STRIDE = 8  # of the pixels that the vectors hold
CASE = re.compile(
    r"(?P<graph>graph\.l(?P<layer>\d+))?(?P<clap>algm\.clap-l(?P<window>\d+))?(?P<algm>algm\.l(?P<layers>\d+(-\d+)+))?"
    r"(?P<tome>tome\.segmenter\.r(?P<r>\d+))?(\.t(?P<t>[\d.]+?))?(\.(?P<mode>none|prop|iprop))?\.(?P<batch>b\d)\.logits"
)


def cases(vectors: Vectors) -> Cases:
    """All cases of a Segmenter, which lies in the folder of the vectors as a run."""
    if not any(name.endswith(".logits") for name in vectors):
        return
    model = load_model(vectors.file.parent)[0]
    for name in sorted(name.rpartition(".")[0] for name in vectors if name.endswith(".logits")):
        match = CASE.fullmatch(f"{name}.logits")
        if name.startswith("pure"):
            yield Case("pure", name, partial(_pure, vectors, model, name))
        elif match is not None:
            family = name.split(".")[0]
            yield Case(f"{family} in a Segmenter", name, partial(_merged, vectors, model, name, match))
    more: dict[str, Callable[[], None]] = {
        "pure.b1.features": lambda: same(
            "features", model.encoder.forward_features(vectors["x1"].float()), vectors["pure.b1.features"], MODEL
        )
    }
    for name in vectors:
        if found := re.fullmatch(r"pure\.b1\.(enc|dec)_attn_l(\d+)", name):
            part = {"enc": "encoder", "dec": "decoder"}[found[1]]
            more[name] = partial(_attention, vectors, model, name, int(found[2]), part)
        elif found := re.fullmatch(r"pure\.slide\.flip([01])", name):
            more[name] = partial(_sliding, vectors, model, name, found[1] == "1")
    for name, check in sorted(more.items()):
        if name in vectors:
            yield Case("pure", name, check)


def _pure(v: Vectors, model: Segmenter, name: str) -> None:
    images = {"b1": "x1", "b2": "x2", "rect": "xrect"}[name.split(".")[1]]
    same("logits", model(v[images].float())[..., ::STRIDE, ::STRIDE], v[f"{name}.logits"], MODEL)


def _attention(v: Vectors, model: Segmenter, name: str, layer: int, part: str) -> None:
    same("attention", model.attention(v["x1"].float(), layer, part), v[name], MODEL)


def _sliding(v: Vectors, model: Segmenter, name: str, flipped: bool) -> None:
    found = view_logits(model, v["xslide"][0].float(), flipped, Windows.of(192, 128), (300, 440))
    same("probabilities", found.softmax(0)[:, ::STRIDE, ::STRIDE], v[name], MODEL)


def _merged(v: Vectors, model: Segmenter, name: str, match: re.Match[str]) -> None:
    method, options = _options(match)
    images = v["x" + match["batch"][1:]].float()
    patch.apply(model, method, **options)
    try:
        logits, reduction = model(images), patch.reduction(model)
    finally:
        patch.remove(model)
    same("logits", logits[..., ::STRIDE, ::STRIDE], v[f"{name}.logits"], MODEL)
    expected = v[f"{name}.assignment"].view(len(images), -1)
    same_partition("the reduction", reduction.assignment, expected)
    if f"{name}.size" in v:  # in the published order of tokens
        exactly("the sizes", reduction.sizes, v[f"{name}.size"].view(len(images), -1)[:, 1:])


def _options(match: re.Match[str]) -> tuple[str, dict]:
    """Method and options that the name of a case says."""
    attention = {"attention": ATTENTION[match["mode"]]} if match["mode"] else {}
    threshold = {"threshold": float(match["t"])} if match["t"] else {}
    if match["graph"]:
        return "graph", {"layers": [int(match["layer"])]} | threshold | attention
    if match["tome"]:
        return "tome", {"r": int(match["r"])} | attention
    layers = [int(layer) for layer in (match["window"] or match["layers"]).split("-")]
    return "algm", {"layers": layers, "batch": "uniform"} | threshold | attention
