"""Expedit: clustering, reconstruction, and whole encoders."""

import json
from functools import partial
from typing import Any

import torch
from conformance_common import MODEL, Case, Cases, Vectors, exactly, same
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import g2tm
import patch
from g2tm.expedit import cells
from patch.method import Step

FAMILY = "expedit"


def cases(vectors: Vectors) -> Cases:
    """All cases of a file."""
    for name in sorted(name.removesuffix(".centers") for name in vectors if name.endswith(".centers")):
        check = _reconstruction if name.startswith("reconstruct.") else _encoder
        yield Case(FAMILY, name, partial(check, vectors, name))
    for name in sorted(name.removesuffix(".home") for name in vectors if name.endswith(".home")):
        yield Case(FAMILY, name, partial(_clustering, vectors, name))


def parameters(v: Vectors, name: str) -> dict[str, Any]:
    """The parameters of a case, from the header; pairs as tuples."""
    given = json.loads(v.header[name])
    return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}


def _clustering(v: Vectors, name: str) -> None:
    p, x = parameters(v, name), v[f"{name}.x"]
    row, column = (cells(side, own, x.device) for side, own in zip(p["grid"], p["clusters"], strict=True))
    exactly("home", (row[:, None] * p["clusters"][1] + column).flatten(), v[f"{name}.home"])
    rule = {key: p[key] for key in ("clusters", "iterations", "window", "temperature")}
    step = g2tm.expedit(x, p["grid"], **rule)
    same("tokens", step.merge(x), v[f"{name}.tokens"], MODEL)
    exactly("nearest", step.nearest, v[f"{name}.nearest"])


def _reconstruction(v: Vectors, name: str) -> None:
    p = parameters(v, name)
    rule = {"k": p["k"], "temperature": p["temperature"], "weighting": "published"}
    found = g2tm.nearest_weights(v[f"{name}.before"], v[f"{name}.centers"], **rule)
    same("restored", g2tm.mix(v[f"{name}.tokens"], *found), v[f"{name}.restored"], MODEL)


def _build(v: Vectors, name: str) -> nn.Module:
    p = parameters(v, f"vit.model.{name}")
    size = {"img_size": p["image"], "patch_size": p["patch"], "embed_dim": p["width"], "num_heads": p["heads"]}
    norm = partial(nn.LayerNorm, eps=p["norm_eps"])
    model = VisionTransformer(**size, depth=p["depth"], mlp_ratio=p["mlp_ratio"], norm_layer=norm, num_classes=0)
    model.load_state_dict(v.below(f"vit.model.{name}."))
    return model.eval()


@torch.no_grad()
def _encoder(v: Vectors, name: str) -> None:
    p, images = parameters(v, name), v[f"{name}.image"].float()
    model: Any = _build(v, p["model"])
    if f"{name}.plain" in v:
        same("the unpatched model", model.forward_features(images), v[f"{name}.plain"], MODEL)
    given = {"layers": [p["cluster_after"]], "cluster_grid": p["clusters"], "cluster_window": p["window"]}
    given |= {key: p[key] for key in ("iterations", "temperature")}
    if p["place"] != "none":
        given |= {"neighbors": p["k"], "restore_temperature": p["reconstruct_temperature"]}
    given["restore_at"] = p["reconstruct_after"] if p["place"] == "block" else p["place"]
    patch.apply(model, "expedit", weighting="published", **given)
    seen: list[Tensor] = []

    def merge(step: Step) -> g2tm.Reduction | None:
        found = patch.find("expedit").merge(step)
        assert found is not None
        seen.extend((step.x, found.merge(step.x)))
        return found

    with patch.replaced_merge(model, merge):
        features = model.forward_features(images)
    for key, value in zip(("before", "centers"), seen, strict=True):
        same(key, value, v[f"{name}.{key}"], MODEL)
    same("features", features, v[f"{name}.features"], MODEL)
