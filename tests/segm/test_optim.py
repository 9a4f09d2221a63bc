"""Optimizers and schedules."""

import math

import pytest
import torch

from segm.model.factory import create_segmenter
from segm.optim import create_optimizer, create_scheduler, layer_scale


def rates(name, epochs=10, per_epoch=7, lr=0.01, **settings):
    """Learning rate of every update, stepped as the engine does."""
    parameter = torch.nn.Parameter(torch.zeros(2, 2))
    optimizer = torch.optim.SGD([parameter], lr=lr)
    scheduler = create_scheduler(
        optimizer, name, epochs=epochs, updates_per_epoch=per_epoch, learning_rate=lr, **settings
    )
    seen = []
    for epoch in range(epochs):
        scheduler.step(epoch)
        for update in range(per_epoch):
            scheduler.step_update(epoch * per_epoch + update)
            seen.append(optimizer.param_groups[0]["lr"])
    return seen


def poly(t, total, warmup, lr, low=1e-5, start=1.0):
    """The published formula."""
    if t < warmup:
        return lr * start + (lr - lr * start) * t / warmup
    return (lr - low) * (1 - (t - warmup) / (total - warmup)) ** 0.9 + low


def test_polynomial_schedules_count_iterations_or_epochs():
    for warmup, start in ((0, 1.0), (2, 0.1), (3, 0.25)):
        given = {"warmup_epochs": warmup, "start_factor": start}
        iterations = [poly(t, 70, 7 * warmup, 0.01, start=start) for t in range(70)]
        assert rates("polynomial", **given) == pytest.approx(iterations, rel=1e-9)
        epochs = [poly(t // 7, 10, warmup, 0.01, start=start) for t in range(70)]
        assert rates("polynomial_epoch", **given) == pytest.approx(epochs, rel=1e-9)


def test_cosine_falls_from_the_rate_to_the_minimum():
    seen = rates("cosine", min_lr=1e-4)
    expected = [1e-4 + (0.01 - 1e-4) * (1 + math.cos(math.pi * t / 70)) / 2 for t in range(70)]
    assert seen == pytest.approx(expected, rel=1e-9)


def test_sgd_is_plain_momentum_over_what_learns(small_net):
    model = create_segmenter(small_net)
    optimizer = create_optimizer(model, "sgd", 0.01)
    assert all(g["momentum"] == 0.9 and not g["nesterov"] and g["weight_decay"] == 0 for g in optimizer.param_groups)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert id(model.encoder.head.weight) not in held


def test_adamw_decays_neither_biases_nor_embeddings(small_net):
    model = create_segmenter(small_net)
    optimizer = create_optimizer(model, "adamw", 1e-3, weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, parameter in model.named_parameters() if id(parameter) in decayed}
    assert all(parameter.ndim > 1 for parameter in model.parameters() if id(parameter) in decayed)
    assert names and not names & {"encoder.pos_embed", "encoder.cls_token", "decoder.cls_emb"}


def test_unknown_names_and_endless_warmups_are_refused(small_net):
    with pytest.raises(ValueError, match="sgd or adamw"):
        create_optimizer(create_segmenter(small_net), "lion", 1e-3)
    with pytest.raises(ValueError, match="polynomial, polynomial_epoch, cosine"):
        rates("step")
    with pytest.raises(ValueError, match="warm-up"):
        rates("cosine", warmup_epochs=10)


def test_layers_and_parts_learn_at_their_own_rates(small_net):
    model = create_segmenter(small_net)
    depth = len(model.encoder.blocks)
    optimizer = create_optimizer(
        model, "adamw", 1.0, 0.05, lambda name, _: layer_scale(name, depth, encoder=0.1, decay=0.5)
    )
    scheduler = create_scheduler(optimizer, "polynomial", epochs=2, updates_per_epoch=4, learning_rate=1.0, min_lr=0.0)
    scheduler.step_update(0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert found["decoder.cls_emb"] == 1.0 and found["encoder.norm.weight"] == pytest.approx(0.1)
    assert found[f"encoder.blocks.{depth - 1}.mlp.fc1.weight"] == pytest.approx(0.1 * 0.5)
    assert found["encoder.blocks.0.mlp.fc1.weight"] == pytest.approx(0.1 * 0.5**depth)
    assert found["encoder.pos_embed"] == pytest.approx(0.1 * 0.5 ** (depth + 1))


def test_a_model_with_nothing_to_train_is_refused(small_net):
    model = create_segmenter(small_net).requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter to train"):
        create_optimizer(model, "sgd", 0.1)
