"""ClustViT: the two modules by themselves, a whole encoder, labels and loss."""

import copy
import re
from functools import partial

import timm
import torch
from conformance_common import MODEL, Case, Cases, DoesNotHoldError, Vectors, exactly, same, with_cls
from torch import Tensor, nn

import patch
from g2tm import Clusters, cluster_labels, clustering_loss

FAMILY = "clustvit"


def cases(vectors: Vectors) -> Cases:
    """All cases of a file."""
    for name in sorted({name.split(".")[1] for name in vectors if name.startswith("seq.") and name.endswith(".x")}):
        yield Case(FAMILY, f"seq.{name}", partial(_sequence, vectors, f"seq.{name}"))
    for name in sorted({name.split(".")[1] for name in vectors if re.fullmatch(r"vit\.\w+\.logits", name)}):
        yield Case(FAMILY, f"vit.{name}", partial(_encoder, vectors, name))
    if "vit.batch.ids" in vectors and "vit.alone1.ids" in vectors:
        yield Case(FAMILY, "vit.alone in a batch", partial(_alone_in_a_batch, vectors))
    for name in sorted(name for name in vectors if re.fullmatch(r"labels\.(patch\d+\.)?k\d+", name)):
        yield Case(FAMILY, name, partial(_labels, vectors, name))
    if "loss.value" in vectors:
        yield Case(FAMILY, "loss", partial(_loss, vectors))


def modules(weights: dict[str, Tensor]) -> tuple[nn.Sequential, nn.Sequential]:
    """Cluster module and Regenerator of some weights."""
    hidden, width = weights["clusterer.net.0.weight"].shape
    logits = len(weights["clusterer.net.2.weight"])
    cluster = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, logits))
    expand = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, width))
    for module, name in ((cluster, "clusterer.net."), (expand, "expand_mlp.")):
        module.load_state_dict({key.removeprefix(name): v for key, v in weights.items() if key.startswith(name)})
    return cluster, expand


def _heads(v: Vectors) -> int:
    if not v.numbers("heads"):
        raise v.lacks("heads")
    return v.numbers("heads")[0]


def patch_size(v: Vectors) -> tuple[int, int]:
    """(height, width) in pixels: as the header says, or as follows from the patch embedding, or from a label map."""
    sides = v.numbers("patch_size")
    if not sides and "vit.state.patch_embed.proj.weight" in v:
        sides = list(v["vit.state.patch_embed.proj.weight"].shape[-2:])
    grids = [values for name, values in v.items() if re.fullmatch(r"labels\.k\d+", name)]
    if not sides and grids:
        pairs = zip(v["labels.map"].shape[1:], grids[0].shape[1:], strict=True)
        sides = [side // count for side, count in pairs if side % count == 0]
    if len(sides) not in (1, 2):
        raise v.lacks("patch_size")
    return sides[0], sides[-1]


def injection_point(v: Vectors) -> int:
    """The block before the merge: as the header says, or the first whose output the file has."""
    outputs = [int(match[1]) for name in v if (match := re.fullmatch(r"vit\.\w+\.block(\d+)", name))]
    return (v.numbers("injection_point") or [min(outputs)])[0]


def _sequence(v: Vectors, name: str) -> None:
    cluster, expand = modules(v.below("seq."))
    x, ids = v[f"{name}.x"][:, 1:], v[f"{name}.ids"].long()
    logits = cluster(x)
    same("logits", logits, v[f"{name}.logits"], MODEL)
    exactly("ids", logits.argmax(-1), ids)
    skipped = (ids == ids[:1, :1]).all().expand(len(ids))
    step = Clusters(x, ids, logits.shape[-1] - 1, expand, skipped)
    reduced = with_cls(v[f"{name}.x"], step.merge(x))
    same("reduced", reduced, v[f"{name}.reduced"], MODEL)
    padding = torch.zeros_like(reduced[:, 1:, 0]) if step.padding is None else step.padding
    exactly("mask", with_cls(0, padding.int()), v[f"{name}.mask"].int())
    processed = v[f"{name}.processed"]
    same("regenerated", with_cls(processed, step.unmerge(processed[:, 1:])), v[f"{name}.regenerated"], MODEL)


def build(v: Vectors) -> nn.Module:
    """timm's encoder with the weights of the file."""
    weights = v.below("vit.state.")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    hidden, width = weights["clusterer.net.0.weight"].shape
    size = {"img_size": tuple(v["vit.x"].shape[-2:]), "patch_size": patch_size(v), "embed_dim": width}
    size |= {"depth": depth, "num_heads": _heads(v), "mlp_ratio": len(weights["blocks.0.mlp.fc1.bias"]) / width}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, **size).eval()
    patch.add_modules(model, "clustvit", clusters=len(weights["clusterer.net.2.bias"]) - 1, cluster_width=hidden)
    lacks = {"patch_embed.proj.bias": torch.zeros(width)}
    model.load_state_dict(lacks | {name: values.float() for name, values in weights.items()})
    return model


def outputs(model: nn.Module, images: Tensor, point: int, rule: str) -> dict[str, Tensor]:
    """All patches as a decoder reads them after every block from the injection point on; logits and ids."""
    depth, found = len(model.blocks), dict[str, Tensor]()
    for last in range(point, depth + 1):
        short = copy.deepcopy(model)
        del short.blocks[last:]
        if last < depth:
            short.norm = nn.Identity()
        if last > point:
            patch.apply(short, "clustvit", injection_point=point, cluster_rule=rule)
        found[f"block{last}"] = short.forward_features(images)
    logits = patch.reduction(short).logits
    return found | {"logits": logits, "ids": logits.argmax(-1)}


def _encoder(v: Vectors, name: str) -> None:
    model = build(v)
    index = re.fullmatch(r"alone(\d+)", name)
    images = v["vit.x"].float()
    images = images if index is None else images[int(index[1])][None]
    found = outputs(model, images, injection_point(v), "batch")
    exactly("ids", found.pop("ids"), v[f"vit.{name}.ids"].long())
    for key, expected in v.below(f"vit.{name}.").items():
        if key != "ids":
            same(key, found[key], expected, MODEL)


def _alone_in_a_batch(v: Vectors) -> None:
    """Hold an image in a batch against the same image alone: each decides for itself."""
    found = outputs(build(v), v["vit.x"].float(), injection_point(v), "image")
    last = max(key for key in found if key.startswith("block"))
    for name in sorted({name.split(".")[1] for name in v if name.startswith("vit.alone")}):
        same(name, found[last][int(name.removeprefix("alone"))][None], v[f"vit.{name}.{last}"], MODEL)


def _labels(v: Vectors, name: str) -> None:
    match = re.fullmatch(r"labels\.(?:patch(\d+)\.)?k(\d+)", name)
    if match is None:
        raise DoesNotHoldError(f"{name} is no case of labels")
    sides = (int(match[1]), int(match[1])) if match[1] else patch_size(v)
    exactly("labels", cluster_labels(v["labels.map"], sides, int(match[2])), v[name].long())


def _loss(v: Vectors) -> None:
    logits = v["loss.logits"]
    ids = cluster_labels(v["labels.map"], patch_size(v), logits.shape[-1] - 1)
    loss = clustering_loss(logits, ids)
    same("loss", loss, v["loss.value"], MODEL)
    if "loss.weighted" in v:
        weight = float(v.header.get("loss_weight", patch.find("clustvit").options["cluster_weight"].default))
        same("weighted loss", weight * loss, v["loss.weighted"], MODEL)
