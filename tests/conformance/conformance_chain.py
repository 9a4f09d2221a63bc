"""Whole blocks under a patch, at inference and in training, against vectors."""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import timm
import torch
from conformance_common import MODEL, Case, Cases, Vectors, exactly, same, same_partition, with_cls
from conformance_steps import candidates_of, operations
from torch import Tensor, nn

import g2tm
import patch
from patch.method import Step
from patch.patching import merging_of

FAMILY = "chain of blocks"


def cases(vectors: Vectors) -> Cases:
    """The cases `chain.*` of a file."""
    if "chain.input" not in vectors:
        return
    yield Case(FAMILY, "chain.plain", partial(_plain, vectors))
    for method, check in INFERENCE.items():
        if f"chain.{method}.block1.x" in vectors:
            yield Case(FAMILY, f"chain.{method}", partial(check, vectors))
    for method, check in TRAINING.items():
        if any(name.startswith(f"chain.{method}.train.") for name in vectors):
            yield Case(f"{FAMILY}, training", f"chain.{method}.train", partial(check, vectors))


def _model(v: Vectors, method: str | None = None, **parts: Any) -> nn.Module:
    """The blocks as a ViT, which takes `chain.input` for its tokens whatever the image: a row of patches."""
    weights, n_patches = v.below("chain.blocks."), v["chain.input"].shape[1] - 1
    width, hidden = weights["0.mlp.fc2.weight"].shape
    depth = 1 + max(int(name.split(".")[0]) for name in weights)
    size = {"img_size": (1, n_patches), "patch_size": 1, "embed_dim": width, "depth": depth}
    size["num_heads"] = _heads(v, width)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=0, mlp_ratio=hidden / width, **size)
    plain = {name: value for name, value in weights.items() if "metric_layer" not in name}
    model.blocks.load_state_dict(plain)
    if method is not None:
        patch.add_modules(model, method, **parts)
    if method == "dtem":
        for name, value in weights.items():
            if "metric_layer" in name:
                model.blocks.get_parameter(name.replace("metric_layer", "qkv.metric_layer")).data.copy_(value)
    model.norm = nn.Identity()
    model.blocks.register_forward_pre_hook(lambda blocks, inputs: (v["chain.input"],))
    return model.eval()


def _heads(v: Vectors, width: int) -> int:
    """Their number: as the header says, or as follows from DTEM's embedding or an attention map."""
    if v.numbers("heads"):
        return v.numbers("heads")[0]
    if "chain.blocks.0.attn.metric_layer.bias" in v:  # as wide as a head, or twice that
        return width * (1 if width < 1024 else 2) // len(v["chain.blocks.0.attn.metric_layer.bias"])
    maps = [values for name, values in v.items() if re.fullmatch(r"n\d+\.attn", name)]
    if not maps:
        raise v.lacks("heads")
    return maps[0].shape[1]


def _forward(v: Vectors, model: Any) -> Tensor:
    return model.forward_features(torch.zeros(len(v["chain.input"]), 3, *model.patch_embed.img_size))


def _outputs(v: Vectors, model: Any) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """(1-based block, its output, sizes of its patch tokens, prefix included)."""
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda m, i, output: found.append(output)) for block in model.blocks]
    _forward(v, model)
    for handle in handles:
        handle.remove()
    steps = patch.reductions(model)
    for layer, output in enumerate(found, start=1):
        sizes = with_cls(1.0, steps[layer].sizes) if layer in steps else None
        yield layer, output, sizes


def _compare(v: Vectors, model: nn.Module, case: str) -> None:
    """Values and sizes after every block, and the whole assignment."""
    for layer, x, sizes in _outputs(v, model):
        same(f"x after block {layer}", x, v[f"{case}.block{layer}.x"], MODEL)
        if f"{case}.block{layer}.size" in v:
            same(f"the size after block {layer}", sizes, v.sizes(f"{case}.block{layer}.size"), MODEL)
    if f"{case}.assignment" in v:
        exactly("the assignment", with_cls(0, 1 + patch.reduction(model).assignment), v[f"{case}.assignment"])


def _plain(v: Vectors) -> None:
    same("x", _forward(v, _model(v)), v["chain.plain.x"], MODEL)


def _diffrate(v: Vectors) -> None:
    counts = {name: v[f"chain.diffrate.{name}"].int().tolist() for name in ("prune_kept", "merge_kept")}
    _compare(v, patch.apply(_model(v), "diffrate", **counts), "chain.diffrate")


def _dct(v: Vectors) -> None:
    _compare(v, patch.apply(_model(v), "dct", r=v["chain.dct.r"].int().tolist()), "chain.dct")


def _dtem(v: Vectors) -> None:
    _compare(v, patch.apply(_model(v, "dtem"), "dtem", r=v["chain.dtem.r"].int().tolist()), "chain.dtem")


def _atc(v: Vectors) -> None:
    """In any order of clusters: values and sizes are compared where the tokens came from."""
    counts = v["chain.atc.clusters"].int().tolist()
    model = patch.apply(_model(v), "atc", layers=list(range(1, len(counts) + 1)))

    def merge(step: Step) -> g2tm.Grouping:
        return g2tm.atc(step.keys, clusters=counts[step.layer - 1], sizes=step.sizes)

    with patch.replaced_merge(model, merge):
        outputs = list(_outputs(v, model))
    own, expected = patch.reduction(model).assignment, v["chain.atc.assignment"][:, 1:] - 1
    same_partition("the clustering", own, expected)
    _, x, sizes = outputs[-1]
    last = f"chain.atc.block{len(counts)}"
    same("x", _gather(x[:, 1:], own), _gather(v[f"{last}.x"][:, 1:], expected), MODEL)
    same("the size", sizes[:, 1:].gather(1, own), v.sizes(f"{last}.size")[:, 1:].gather(1, expected), MODEL)
    for layer, x, _ in outputs:  # the same tokens, in another order
        theirs = v[f"chain.atc.block{layer}.x"]
        same(f"the sum after block {layer}", x.sum(1), theirs.sum(1), MODEL, relative=True)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.long().unsqueeze(2).expand(-1, -1, x.shape[2]))


def _ltmp_model(v: Vectors) -> Any:
    model: Any = _model(v, "ltmp")
    for index, block in enumerate(model.blocks):
        for kind in ("merge", "prune"):
            masker = getattr(block, f"{kind}_masker")
            masker.threshold.data.fill_(v[f"chain.ltmp.{kind}_threshold"][index])
    return model


def _ltmp(v: Vectors) -> None:
    """Image by image, as the vectors are padded."""
    model = patch.apply(_ltmp_model(v), "ltmp", learned=True)
    with torch.no_grad():
        for layer, x, sizes in _outputs(v, model):
            count = v[f"chain.ltmp.block{layer}.count"]
            exactly("the number of tokens", 1 + patch.reductions(model)[layer].counts, count)
            real = (torch.arange(x.shape[1]) < count[:, None]).float()
            same(f"x after block {layer}", x * real.unsqueeze(2), v[f"chain.ltmp.block{layer}.x"], MODEL)
            same(f"the size after block {layer}", sizes * real, v.sizes(f"chain.ltmp.block{layer}.size"), MODEL)


def _ltmp_training(v: Vectors) -> None:
    case, target = "chain.ltmp.train", float(v["chain.ltmp.train.target"])
    model = patch.apply(_ltmp_model(v), "ltmp", learned=True, flops_target=target, flops_weight=1.0).train()
    outputs = list(_outputs(v, model))
    for layer, x, sizes in outputs:
        mask = with_cls(1.0, merging_of(model).last.track().soft_steps[layer].mask)
        same(f"x after block {layer}", x, v[f"{case}.block{layer}.x"], MODEL)
        same(f"the size after block {layer}", sizes, v.sizes(f"{case}.block{layer}.size"), MODEL)
        same(f"the mask after block {layer}", mask, v[f"{case}.block{layer}.mask"])
    loss = patch.loss(model)
    same("the loss", loss, v[f"{case}.reg_loss"])
    cls = outputs[-1][1][:, 0]
    same("CLS", cls, v[f"{case}.cls"], MODEL)
    for name, value in (("reg", loss), ("cls", (cls * v[f"{case}.cls_cotangent"]).sum())):
        for kind in ("merge", "prune"):
            parameters = [getattr(block, f"{kind}_masker").threshold for block in model.blocks]
            found = _gradients(value, parameters)
            same(
                f"the {name} gradient of {kind}",
                torch.cat(found),
                v[f"{case}.{kind}_threshold_{name}_grad"],
                MODEL,
                True,
            )


def _gradients(value: Tensor, parameters: list[Tensor]) -> tuple[Tensor, ...]:
    given = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    return torch.autograd.grad(value, parameters, **given)


def _diffrate_training(v: Vectors) -> None:
    case, model = "chain.diffrate.train", _model(v, "diffrate")
    patches = v["chain.input"].shape[1] - 1
    rates: dict[str, list[Any]] = {"prune": [], "merge": []}
    for index, block in enumerate(model.blocks, start=1):
        for kind, known in rates.items():
            rate = getattr(block, f"{kind}_ddp")
            logits = v[f"{case}.block{index}.{kind}_logits"]
            rate.kept_token_candidate = candidates_of(v, logits, patches)
            rate.selected_probability.data = logits.clone()
            known.append(rate)
    patch.apply(model, "diffrate", learned=True).train()
    counts = {kind: [rate(1) for rate in known] for kind, known in rates.items()}
    for kind, known in counts.items():
        same(f"the tokens of {kind}", torch.stack(known), v[f"{case}.{kind}_kept"])
    _, x, sizes = list(_outputs(v, model))[-1]
    alive = v[f"{case}.x_kept"].shape[1]
    same("x", x[:, :alive], v[f"{case}.x_kept"], MODEL)
    same("the size", sizes[:, :alive], v.sizes(f"{case}.size_kept"), MODEL)
    same("the mask", with_cls(1.0, merging_of(model).last.track().tokens.soft_mask), v[f"{case}.mask"])
    expected = v[f"{case}.mflops"]
    flops = 1e3 * operations(v, case, expected / 1e3, list(counts.values()), x.shape[2], patches)
    same("MFLOPs", flops, expected, MODEL)
    task = (x[:, :alive] * v[f"{case}.x_cotangent"]).sum()
    for name, value in (("x", task), ("flops", flops)):
        for kind, known in rates.items():
            found = _gradients(value, [rate.selected_probability for rate in known])
            for index, gradient in enumerate(found, start=1):
                what = f"block{index}.{kind}_{name}_grad"
                same(what, gradient, v[f"{case}.{what}"], MODEL, relative=True)


INFERENCE = {"diffrate": _diffrate, "dct": _dct, "atc": _atc, "dtem": _dtem, "ltmp": _ltmp}
TRAINING = {"diffrate": _diffrate_training, "ltmp": _ltmp_training}
