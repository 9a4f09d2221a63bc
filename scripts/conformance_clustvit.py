"""ClustViT: the two modules by themselves, a whole encoder, labels and loss."""

import copy
import re
from functools import partial

import timm
import torch
from conformance_common import MODEL, Case, Cases, DoesNotHoldError, Vectors, exactly, same
from torch import Tensor, nn

import patch
from g2tm import Clusters, cluster_labels, clustering_loss

FAMILY, PATCH, POINT = "clustvit", 16, 2


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


def _sequence(v: Vectors, name: str) -> None:
    cluster, expand = modules(v.below("seq."))
    x, ids = v[f"{name}.x"][:, 1:], v[f"{name}.ids"].long()
    logits = cluster(x)
    same("logits", logits, v[f"{name}.logits"], MODEL)
    exactly("ids", logits.argmax(-1), ids)
    skipped = (ids == ids[:1, :1]).all().expand(len(ids))
    step = Clusters(x, ids, logits.shape[-1] - 1, expand, skipped)
    reduced = torch.cat([v[f"{name}.x"][:, :1], step.merge(x)], dim=1)
    same("reduced", reduced, v[f"{name}.reduced"], MODEL)
    padding = torch.zeros_like(reduced[..., 0], dtype=torch.bool)
    if step.padding is not None:
        padding[:, 1:] = step.padding
    exactly("mask", padding.int(), v[f"{name}.mask"].int())
    processed = v[f"{name}.processed"]
    found = torch.cat([processed[:, :1], step.unmerge(processed[:, 1:])], dim=1)
    same("regenerated", found, v[f"{name}.regenerated"], MODEL)


def build(v: Vectors) -> nn.Module:
    """timm's encoder with the weights of the file."""
    weights = v.below("vit.state.")
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    hidden, width = weights["clusterer.net.0.weight"].shape
    size = {"img_size": tuple(v["vit.x"].shape[-2:]), "patch_size": PATCH, "embed_dim": width, "depth": depth}
    size["mlp_ratio"] = len(weights["blocks.0.mlp.fc1.bias"]) / width
    model = timm.create_model("vit_tiny_patch16_224", num_classes=0, num_heads=2, **size).eval()
    patch.add_modules(model, "clustvit", clusters=len(weights["clusterer.net.2.bias"]) - 1, cluster_width=hidden)
    lacks = {"patch_embed.proj.bias": torch.zeros(width)}
    model.load_state_dict(lacks | {name: values.float() for name, values in weights.items()})
    return model


def outputs(model: nn.Module, images: Tensor, rule: str) -> dict[str, Tensor]:
    """What a decoder reads behind every block from the injection point on, all patches each; logits and ids."""
    depth, found = len(model.blocks), dict[str, Tensor]()
    for last in range(POINT, depth + 1):
        short = copy.deepcopy(model)
        del short.blocks[last:]
        if last < depth:
            short.norm = nn.Identity()
        if last > POINT:
            patch.apply(short, "clustvit", injection_point=POINT, cluster_rule=rule)
        found[f"block{last}"] = short.forward_features(images)
    logits = patch.reduction(short).logits
    return found | {"logits": logits, "ids": logits.argmax(-1)}


def _encoder(v: Vectors, name: str) -> None:
    model = build(v)
    index = re.fullmatch(r"alone(\d+)", name)
    images = v["vit.x"].float()
    images = images if index is None else images[int(index[1])][None]
    found = outputs(model, images, "batch")
    exactly("ids", found.pop("ids"), v[f"vit.{name}.ids"].long())
    for key, values in found.items():
        same(key, values, v[f"vit.{name}.{key}"], MODEL)


def _alone_in_a_batch(v: Vectors) -> None:
    """Where every image decides for itself, its neighbors do not matter."""
    found = outputs(build(v), v["vit.x"].float(), "image")
    last = max(key for key in found if key.startswith("block"))
    for name in sorted({name.split(".")[1] for name in v if name.startswith("vit.alone")}):
        same(name, found[last][int(name.removeprefix("alone"))][None], v[f"vit.{name}.{last}"], MODEL)


def _labels(v: Vectors, name: str) -> None:
    match = re.fullmatch(r"labels\.(?:patch(\d+)\.)?k(\d+)", name)
    if match is None:
        raise DoesNotHoldError(f"{name} is no case of labels")
    side = int(match[1] or PATCH)
    exactly("labels", cluster_labels(v["labels.map"], (side, side), int(match[2])), v[name].long())


def _loss(v: Vectors) -> None:
    logits = v["loss.logits"]
    ids = cluster_labels(v["labels.map"], (PATCH, PATCH), logits.shape[-1] - 1)
    loss = clustering_loss(logits, ids)
    same("loss", loss, v["loss.value"], MODEL)
    if "loss.weighted" in v:
        same("weighted loss", 0.1 * loss, v["loss.weighted"], MODEL)
