"""CubistMerge: lines, grids, and whole encoders; with all tokens of a group, where the published code loses one."""

import re
from functools import partial
from typing import Any

import torch
from conformance_common import MODEL, Case, Cases, Vectors, exactly, same
from conformance_expedit import parameters
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import g2tm
import patch
from patch.method import Step

FAMILY = "cubist"
MODELS: dict[str, type[nn.Module]] = {"VisionTransformer": VisionTransformer, "Eva": Eva}


def cases(vectors: Vectors) -> Cases:
    """All cases of a file."""
    for kind, check in {"line": _line, "grid": _grid, "vit": _encoder}.items():
        for match in (re.fullmatch(rf"({kind}\.\w+)\.merged", name) for name in sorted(vectors)):
            if match is not None:
                yield Case(FAMILY, match[1], partial(check, vectors, match[1]))


def _line(v: Vectors, name: str) -> None:
    """As the only row of a grid, and as its only column."""
    p, x = parameters(v, name), v[f"{name}.x"]
    for grid, remove in (((1, p["length"]), (0, p["r"])), ((p["length"], 1), (p["r"], 0))):
        _step(v, name, g2tm.cubist(x, grid, remove=remove))


def _step(v: Vectors, name: str, step: g2tm.Reduction) -> None:
    same("merged", step.merge(v[f"{name}.x"]), v[f"{name}.merged"], MODEL)
    exactly("assignment", step.assignment, v[f"{name}.assignment"])


def _grid(v: Vectors, name: str) -> None:
    p = parameters(v, name)
    step = g2tm.cubist(v[f"{name}.x"], p["grid"], remove=p["r"])
    _step(v, name, step)
    exactly("reduced grid", torch.tensor(step.grid), torch.tensor(p["reduced"]))
    same("restored", step.unmerge(v[f"{name}.y"]), v[f"{name}.restored"], MODEL)


@torch.no_grad()
def _encoder(v: Vectors, name: str) -> None:
    p, images = parameters(v, name), v[f"{name}.image"].float()
    given = parameters(v, f"vit.model.{p['model']}")
    arguments = given["arguments"] | {"img_size": given["image"]}
    model: Any = MODELS[given["timm"]](**arguments).eval()
    model.load_state_dict(v.below(f"vit.model.{p['model']}."))
    if f"{name}.plain" in v:
        same("the unpatched model", model.forward_features(images), v[f"{name}.plain"], MODEL)
    remove = (p["share"], p["share"]) if p["share"] else p["r"]
    at = "decoder" if p["restore"] else "none"
    patch.apply(model, "cubist", layers=[p["merge_before"]], remove=remove, restore_at=at)
    seen: dict[str, Tensor] = {}

    def merge(step: Step) -> g2tm.Reduction | None:
        found = patch.find("cubist").merge(step)
        assert found is not None
        seen.update(before=step.x, merged=found.merge(step.x))
        return found

    with patch.replaced_merge(model, merge):
        features = model.forward_features(images)
    for key, value in seen.items():
        same(key, value, v[f"{name}.{key}"], MODEL)
    exactly("assignment", patch.reduction(model).assignment, v[f"{name}.assignment"])
    same("features", features, v[f"{name}.features"], MODEL)
