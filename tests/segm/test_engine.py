"""The training loop: order of data, precision, loss."""

import copy
import math
import time

import pytest
import torch

import patch
from segm.data import create_dataset
from segm.data.shapes import ShapesDataset
from segm.engine import (
    EpochSampler,
    Precision,
    compile_blocks,
    create_loader,
    segmentation_loss,
    train_one_epoch,
)
from segm.model.factory import create_segmenter
from segm.optim import create_optimizer, create_scheduler
from tests.helpers import by_speed


class StoppedError(Exception):
    """Carries the position, and what a checkpoint holds."""


def train(net, epochs, *, start=0, state=None, workers=0, amp=False, stop_after=None, **options):
    """Train on a few shapes; returns the model, what a checkpoint holds, and the last entry."""
    torch.manual_seed(0)
    model = create_segmenter(net)
    loader = create_loader(create_dataset("shapes", "train", image_size=32, length=10), 4, workers=workers)
    optimizer = create_optimizer(model, "sgd", 0.05)
    scheduler = create_scheduler(optimizer, "polynomial", epochs=4, updates_per_epoch=len(loader), learning_rate=0.05)
    if state is not None:
        model.load_state_dict(state[0])
        optimizer.load_state_dict(state[1])
    device = torch.device("cpu")

    def after_update(position):
        if position.updates == stop_after:
            raise StoppedError(position, copy.deepcopy((model.state_dict(), optimizer.state_dict())))

    for epoch in range(start, epochs):
        entry = train_one_epoch(
            model, loader, optimizer, scheduler, Precision.choose(device, amp), epoch, device=device, progress=False,
            after_update=after_update, **options,
        )  # fmt: skip
    return model, (model.state_dict(), optimizer.state_dict()), entry


def equal_weights(a, b):
    return all(torch.equal(a.state_dict()[key], b.state_dict()[key]) for key in a.state_dict())


@pytest.fixture
def net(small_net):
    """With dropout and drop path, so that random numbers matter."""
    return small_net | {"n_cls": 11, "drop_path_rate": 0.3, "decoder": {"name": "mask_transformer", "dropout": 0.1}}


def test_a_resumed_training_ends_with_the_same_weights(net):
    whole, _, last = train(net, 4)
    half, state, _ = train(net, 2)
    resumed, _, resumed_last = train(net, 4, start=2, state=copy.deepcopy(state))
    assert equal_weights(whole, resumed) and not equal_weights(whole, half)
    measured = {"images_per_second": 0, "data_wait": 0, "memory_mb": 0}
    assert {**last, **measured} == {**resumed_last, **measured}


def test_the_number_of_workers_changes_nothing(net):
    assert equal_weights(train(net, 1)[0], train(net, 1, workers=2)[0])


def test_the_entry_says_what_happened(net):
    _, _, entry = train(net, 2)
    assert entry["num_updates"] == 4 and entry["train_loss"] > 0 and entry["images_per_second"] > 0
    assert 1e-5 < entry["train_learning_rate"] < 0.05


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_was(net, workers):
    """With the same weights and the same entry, whatever happened to random numbers in between."""
    whole, _, entry = train(net, 1, workers=workers)
    with pytest.raises(StoppedError) as stopped:
        train(net, 1, workers=workers, stop_after=1)
    position, state = stopped.value.args
    resumed, _, rest = train(net, 1, state=state, workers=workers, position=position)
    assert equal_weights(whole, resumed)
    measured = {"images_per_second": 0, "data_wait": 0, "memory_mb": 0}
    assert entry | measured == rest | measured


def test_images_of_a_loss_that_is_not_finite_are_named(net):
    def loss(logits, labels):
        return segmentation_loss(logits, labels) * (math.nan if seen.append(0) or len(seen) == 2 else 1)

    seen = []
    names = EpochSampler(10, 4).order[4:8]
    with pytest.raises(ValueError, match=", ".join(f"train_{index:05d}" for index in names)) as error:
        train(net, 1, loss=loss)
    assert "nan" in str(error.value) and "\n" not in str(error.value)


def test_what_shall_fall_is_a_callback(net):
    """A loss that also knows the model; without one it is the cross-entropy."""
    seen = []

    def loss(logits, labels):
        seen.append((logits.shape, labels.shape))
        return 2 * segmentation_loss(logits, labels)

    plain, _, entry = train(net, 1)
    other, _, doubled = train(net, 1, loss=loss)
    assert seen == [((4, 11, 32, 32), (4, 32, 32))] * 2
    assert doubled["train_loss"] > 1.5 * entry["train_loss"] and not equal_weights(plain, other)
    assert equal_weights(plain, train(net, 1, loss=segmentation_loss)[0])


@pytest.mark.parametrize("method", by_speed(["graph", "tome"], slow=["tome"]))
def test_compiled_blocks_learn_the_same(small_net, method):
    """Forward and gradients, with images of two sizes, and the keys of the model stay."""
    options = {"graph": {"threshold": 0.2}, "tome": {"r": 2, "attention": "proportional"}}[method]
    plain = create_segmenter(small_net)
    compiled = copy.deepcopy(plain)
    for model in (plain, compiled):
        patch.apply(model, method, **options)
    compile_blocks([*compiled.encoder.blocks, *compiled.decoder.blocks], backend="aot_eager")
    for images in (torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 48)):
        outputs = [model(images) for model in (plain, compiled)]
        torch.testing.assert_close(*outputs)
        for output in outputs:
            output.square().mean().backward()
    for (name, expected), (same, parameter) in zip(plain.named_parameters(), compiled.named_parameters(), strict=True):
        assert name == same
        if expected.grad is not None:
            torch.testing.assert_close(parameter.grad, expected.grad)


@pytest.mark.slow
def test_images_of_other_lengths_need_no_other_code(small_net):
    """Attention is compiled once for tokens in rows and once for packed ones, in the encoder and in the decoder."""
    model = patch.apply(create_segmenter(small_net), "graph", threshold=0.2)
    compile_blocks([*model.encoder.blocks, *model.decoder.blocks], backend="eager")
    lengths, counters = set(), torch._dynamo.utils.counters
    torch._dynamo.reset()
    counters.clear()
    for turn in range(7):
        model(torch.randn(3, 3, 32, 32) * torch.tensor([0.2, 1.0, 3.0]).view(3, 1, 1, 1)).sum().backward()
        lengths.add(patch.reduction(model).lengths)
        if turn == 2:
            compiled = counters["stats"]["unique_graphs"]
    assert len(lengths) > 5 and counters["stats"]["unique_graphs"] == compiled
    assert not counters["graph_break"]


def test_waiting_for_data_is_told(net, monkeypatch):
    real = ShapesDataset.load
    monkeypatch.setattr(ShapesDataset, "load", lambda self, index: time.sleep(0.1) or real(self, index))
    assert 80 < train(net, 1)[2]["data_wait"] < 100


def test_the_loss_falls_in_mixed_precision(net):
    first = train(net, 1, amp=True)[2]["train_loss"]
    last = train(net, 4, amp=True)[2]["train_loss"]
    assert last < first


def test_precision_is_bfloat16_on_the_cpu_if_wanted():
    device = torch.device("cpu")
    assert Precision.choose(device, False).dtype is None
    assert Precision.choose(device, True).dtype == torch.bfloat16
    assert not Precision.choose(device, True).scaler.is_enabled()


def test_loss_is_the_mean_over_labelled_pixels():
    logits, labels = torch.randn(2, 5, 6, 7), torch.randint(5, (2, 6, 7))
    labels[0, :3] = 255
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=255)
    torch.testing.assert_close(segmentation_loss(logits, labels), expected)
    assert segmentation_loss(logits, torch.full_like(labels, 255)) == 0


def test_a_diverging_training_stops(net):
    model = create_segmenter(net)
    torch.nn.init.constant_(model.decoder.mask_norm.weight, float("nan"))
    loader = create_loader(create_dataset("shapes", "train", image_size=32, length=4), 4)
    optimizer = create_optimizer(model, "sgd", 0.1)
    scheduler = create_scheduler(optimizer, "polynomial", epochs=1, updates_per_epoch=1, learning_rate=0.1)
    device = torch.device("cpu")
    with pytest.raises(ValueError, match="lower the learning rate"):
        train_one_epoch(model, loader, optimizer, scheduler, Precision.choose(device, False), 0, device=device)


def test_every_image_is_seen_once_per_epoch_in_another_order():
    sampler = EpochSampler(10, 5)
    epochs = []
    for epoch in range(2):
        sampler.epoch = epoch
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch} and sorted(i for _, i in pairs) == list(range(10))
        epochs.append([i for _, i in pairs])
    assert epochs[0] != epochs[1]


def test_processes_share_the_images_of_an_update(monkeypatch):
    """However many they are, an update is made of the same images; they overlap if there are fewer than a batch."""

    def updates(n_images, batch_size, world_size):
        monkeypatch.setattr("segm.parallel.world_size", lambda: world_size)
        orders = []
        for rank in range(world_size):
            monkeypatch.setattr("segm.parallel.rank", lambda rank=rank: rank)
            orders.append(torch.tensor([i for _, i in EpochSampler(n_images, batch_size)]).view(-1, batch_size))
        return [set(torch.cat(images).tolist()) for images in zip(*orders, strict=True)]

    for n_images in (8, 11, 31):
        alone = updates(n_images, 4, 1)
        assert len(alone) == n_images // 4 and sum(map(len, alone)) == 4 * len(alone)
        assert updates(n_images, 2, 2) == updates(n_images, 1, 4) == alone
    assert updates(3, 3, 2) == [{0, 1, 2}]
