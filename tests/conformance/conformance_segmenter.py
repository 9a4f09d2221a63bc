"""The small Segmenter of the released format, plain and merged, against vectors."""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

from conformance_common import MODEL, Case, Cases, Vectors, exactly, same, same_partition
from torch import Tensor

import patch
from segm.config import RunConfig
from segm.eval.sliding import Windows, sliding_logits
from segm.model.factory import load_model
from segm.model.segmenter import Segmenter

ATTENTION = {"none": "none", "prop": "proportional", "iprop": "inverse"}
CASE = re.compile(
    r"(?P<graph>graph\.l(?P<layer>\d+))?(?P<clap>algm\.clap-l(?P<window>\d+))?(?P<algm>algm\.l(?P<layers>\d+(-\d+)+))?"
    r"(?P<tome>tome\.segmenter\.r(?P<r>\d+))?(\.t(?P<t>[\d.]+?))?(\.(?P<mode>none|prop|iprop))?\.(?P<batch>b\d)\.logits"
)


def cases(vectors: Vectors) -> Cases:
    """All cases of a Segmenter, which lies in the folder of the vectors as a run."""
    if not any(name.startswith("pure.") or CASE.fullmatch(name) for name in vectors):
        return
    model, config = load_model(vectors.file.parent)
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
            more[name] = partial(_sliding, vectors, model, name, found[1] == "1", config)
    for name, check in sorted(more.items()):
        if name in vectors:
            yield Case("pure", name, check)


def _sampled(found: Tensor, expected: Tensor) -> Tensor:
    """Every so many-th pixel, as many as the vectors hold."""
    stride = -(-found.shape[-1] // expected.shape[-1])
    return found[..., ::stride, ::stride]


def _pure(v: Vectors, model: Segmenter, name: str) -> None:
    images = "x" + name.split(".")[1].removeprefix("b")
    expected = v[f"{name}.logits"]
    same("logits", _sampled(model(v[images].float()), expected), expected, MODEL)


def _attention(v: Vectors, model: Segmenter, name: str, layer: int, part: str) -> None:
    same("attention", model.attention(v["x1"].float(), layer, part), v[name], MODEL)


def _sliding(v: Vectors, model: Segmenter, name: str, flipped: bool, config: RunConfig) -> None:
    windows = Windows.of(config.inference.window_size, config.inference.window_stride)
    found = sliding_logits(model, v["xslide"][0].float(), flipped, windows, _original_size(v, model, name))
    logits = found.part(slice(None), slice(None)).permute(2, 0, 1)
    same("probabilities", _sampled(logits.softmax(0), v[name]), v[name], MODEL)


def _original_size(v: Vectors, model: Segmenter, name: str) -> tuple[int, int]:
    """Height and width before the image was resized: as the header says, or what its shape and the samples allow."""
    if len(v.numbers("slide_size")) == 2:
        return v.numbers("slide_size")[0], v.numbers("slide_size")[1]
    strides = [
        -(-v["x" + images].shape[-1] // values.shape[-1])
        for case, values in v.items()
        if (match := re.fullmatch(r"pure\.b?(\w+)\.logits", case)) and "x" + (images := match[1]) in v
    ]
    height, width = v["xslide"].shape[-2:]
    stride = strides[0] if strides else 1
    high, wide = (range(stride * (count - 1) + 1, stride * count + 1) for count in v[name].shape[-2:])
    fitting = [(a, b) for a in high for b in wide if a * width == b * height]
    if len(fitting) != 1:
        raise v.lacks("slide_size, the height and width of the photograph")
    return fitting[0]


def _merged(v: Vectors, model: Segmenter, name: str, match: re.Match[str]) -> None:
    method, options = _options(match, v.parameters.get(name, {}))
    images = v["x" + match["batch"][1:]].float()
    patch.apply(model, method, **options)
    try:
        logits, reduction = model(images), patch.reduction(model)
    finally:
        patch.remove(model)
    same("logits", _sampled(logits, v[f"{name}.logits"]), v[f"{name}.logits"], MODEL)
    expected = v[f"{name}.assignment"].view(len(images), -1)
    same_partition("the reduction", reduction.assignment, expected)
    if f"{name}.size" in v:  # in the published order of tokens
        exactly("the sizes", reduction.sizes, v[f"{name}.size"].view(len(images), -1)[:, 1:])


def _options(match: re.Match[str], given: dict[str, Any]) -> tuple[str, dict]:
    """Method and options as the name of a case says, and its parameters."""
    attention = {"attention": ATTENTION[match["mode"]]} if match["mode"] else {}
    threshold = {"threshold": float(match["t"])} if match["t"] else {}
    if match["graph"]:
        return "graph", {"layers": [int(match["layer"])]} | threshold | attention
    if match["tome"]:
        return "tome", {"r": int(match["r"])} | attention
    layers = [int(layer) for layer in (match["window"] or match["layers"]).split("-")]
    window = {"window": tuple(given["window"])} if given.get("window") else {}
    return "algm", {"layers": layers, "batch": "uniform"} | window | threshold | attention
