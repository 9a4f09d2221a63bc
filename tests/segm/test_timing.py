"""Timing, and the images that are timed."""

import numpy as np
import pytest
import torch

from patch.trials import interleaved_trials, ratio, realized_share, share_of_time, speed
from segm.data import create_dataset
from segm.data.images import resized_view
from segm.eval.evaluate import Views
from segm.eval.timing import environment, interleaved_rates

CPU = torch.device("cpu")


def test_models_take_turns_on_every_batch():
    order = []
    calls = {name: lambda batch, name=name: order.append((name, len(batch))) for name in "ab"}
    rates = interleaved_rates(calls, [torch.zeros(2, 1), torch.zeros(3, 1)], CPU, repeats=2, warmup=1)
    turns, other = [("a", 2), ("b", 2)], [("a", 3), ("b", 3)]
    assert order == turns + turns + turns[::-1] + other + other[::-1]
    assert set(rates) == {"a", "b"} and all(rate.shape == (2,) and (rate > 0).all() for rate in rates.values())


def test_a_slow_pass_does_not_count(monkeypatch):
    clock = iter(np.cumsum([0, 1, 0, 9, 0, 1]).tolist())  # passes of 1, 9 and 1 seconds
    monkeypatch.setattr("patch.trials._now", lambda device: next(clock))
    rates = interleaved_rates({"a": len}, [torch.zeros(4, 1)], CPU, repeats=3, warmup=0)
    assert rates["a"].tolist() == [4.0]


def test_ratios_over_trials_stand_a_machine_that_slows_down(monkeypatch):
    """b takes twice as long as a, and everything ten times as long from the second trial on."""
    passes = [1, 2, 20, 10, 10, 20]  # a b, b a, a b
    clock = iter(np.cumsum([0, *(t for seconds in passes for t in (seconds, 0))]).tolist())
    monkeypatch.setattr("patch.trials._now", lambda device: next(clock))
    trials = interleaved_trials({"a": len, "b": len}, [torch.zeros(4, 1)], CPU, repeats=3, warmup=0)
    assert trials["a"].shape == (1, 3)
    assert (trials["a"] / trials["b"]).tolist() == [[2.0, 2.0, 2.0]]


def test_speeds_and_ratios_are_those_of_all_batches_together():
    """Two batches that plain execution takes 1 s for, and merged 0.5 s and 0.25 s; in the last trial all is slower."""
    plain = torch.tensor([[1.0, 1.0, 0.1], [1.0, 1.0, 0.1]])
    merged = plain * torch.tensor([[2.0], [4.0]])
    assert speed(plain) == pytest.approx(1) and speed(merged) == pytest.approx(2 / 0.75)
    assert ratio(merged, plain) == pytest.approx(2 / 0.75)
    assert share_of_time(plain, merged) == pytest.approx(0.375)


def test_the_realized_share_is_speed_gained_over_operations_saved():
    """Half the operations in 0.6 of the time: 1/0.6 of 2 is 0.83; and a model is worth itself."""
    pure = torch.tensor([[10.0, 20.0, 40.0]])
    assert realized_share(pure / 0.6, pure, 1.0, 2.0) == pytest.approx(1 / 1.2)
    assert realized_share(pure, pure, 2.0, 2.0) == 1
    slow = torch.tensor([[1.0, 1.0, 9.0]])  # the median over neighboring calls
    assert realized_share(slow, torch.ones(1, 3), 1.0, 2.0) == pytest.approx(0.5)


def test_views_are_the_images_resized_to_a_square():
    dataset = create_dataset("shapes", "val")
    views = Views(dataset, 32, "vit", 5, batch_size=2)
    assert len(views) == 2  # the fifth image fills no batch
    places = [i * len(dataset) // 5 for i in (2, 3)]  # at equal distances
    expected = torch.cat([resized_view(dataset[i].image, 32, "vit") for i in places])
    assert torch.equal(views[1], expected) and len([*views]) == 2
    copies = Views(dataset, 32, "vit", 5, batch_size=3, duplicate=True, dtype=torch.bfloat16)
    assert len(copies) == 5 and copies[4].shape == (3, 3, 32, 32) and copies[4].dtype == torch.bfloat16
    assert torch.equal(copies[4][0], copies[4][2])
    assert len(Views(dataset, 32, "vit", 2, batch_size=8)) == 1


def test_the_environment_names_the_device():
    found = environment(CPU)
    assert "1 thread" in found["device"] and found["torch"] == torch.__version__
