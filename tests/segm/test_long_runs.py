"""Memory stays flat, however long a training or an evaluation runs."""

import ctypes
import gc
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import patch
from segm import trainer
from segm.data import Sample, SegmentationDataset
from segm.eval.evaluate import evaluate
from segm.eval.sliding import Windows
from segm.losses import Objective
from segm.model.factory import create_segmenter
from segm.optim import create_optimizer
from segm.resolve import resolve
from segm.trainer import Trainer
from tests.helpers import METHOD_OPTIONS, by_speed, with_parts

STATUS = Path("/proc/self/status")
LONG, SHORT, SIDE = 2000, 400, 32  # updates or images; the first quarter warms up
SIZES = [(32, 32), (32, 48), (40, 32), (64, 48)]  # pixels, of photographs
SETTINGS = {"dataset": "shapes", "backbone": "vit_tiny_patch16_384", "batch_size": 1, "epochs": 1, "num_workers": 0}
SETTINGS |= {"n_layers": 1, "d_model": 32, "n_heads": 2, "crop_size": SIDE, "im_size": SIDE}
FLAT = 8.0  # MiB; what allocators and caches of libraries move by


class Noise(SegmentationDataset):
    """Pictures out of nothing, some rougher than others, so that they keep different numbers of tokens."""

    def __init__(self, length):
        names = ("a", "b", "c", "d", "e")
        palette = np.zeros((5, 3), np.uint8)
        settings = {"image_size": SIDE, "crop_size": SIDE, "resize_factor": 4, "normalization": "vit", "seed": 0}
        super().__init__("noise", "train", names, palette, **settings)
        self.length = length

    def __len__(self):
        return self.length

    def name_of(self, index):
        return str(index)

    def load(self, index):
        rng, (h, w) = np.random.default_rng(index), SIZES[index % len(SIZES)]
        label = rng.integers(0, 5, (h, w), dtype=np.uint8)
        image = np.clip(rng.normal(128, 1 + 20 * (index % 7), (h, w, 3)), 0, 255).astype(np.uint8)
        return Sample(str(index), image, label)

    def train_item(self, index, seed):
        rng = torch.Generator().manual_seed(seed + index)
        image = torch.randn(3, SIDE, SIDE, generator=rng) * (0.1 + index % 7)
        return {"image": image, "label": torch.randint(5, (SIDE, SIDE), generator=rng)}


def resident():
    """MiB of this process, after what is free was given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith("VmRSS")) / 1024


def watch(run, n):
    """How many MiB a run holds more after `n` calls of the function that it is given than after a quarter of them."""
    n_calls, seen = 0, []

    def look(*_):
        nonlocal n_calls
        n_calls += 1
        if n_calls in (n // 4, n):
            seen.append(resident())

    run(look)
    before, after = seen
    return after - before


def train_on_noise(model, method, look):
    """Updates on noise."""
    trainer = Trainer(resolve(SETTINGS), "unused", device="cpu", weights=False)
    trainer.objective = Objective(model, method_loss=None if method == "pure" else partial(patch.loss, model))
    trainer.optimizer = create_optimizer(model, "sgd", 1e-4, 0.0)
    trainer.start_epoch()
    model.train()
    for batch in trainer.batches():
        trainer.train_step(batch)
        look()


@pytest.mark.slow
@pytest.mark.skipif(not STATUS.exists(), reason="Linux tells what a process holds")
@pytest.mark.parametrize(
    ("method", "n"),
    by_speed([("graph", SHORT), *((name, LONG) for name in ("pure", *METHOD_OPTIONS))], slow=[("graph", SHORT)]),
)
def test_memory_stays_flat(small_net, method, n, record_property, monkeypatch):
    monkeypatch.setattr(trainer, "open_datasets", lambda *settings: (Noise(n), Noise(1)))
    model = create_segmenter(small_net)
    if method != "pure":
        with_parts(model.encoder, method)
        patch.apply(model, method, **METHOD_OPTIONS[method])
    trained = watch(lambda look: train_on_noise(model, method, look), n)
    evaluated = watch(lambda look: evaluate(model.eval(), Noise(n), Windows.of(SIDE, SIDE), on_image=look), n)
    record_property("grown_mib", [round(trained, 2), round(evaluated, 2)])
    assert max(trained, evaluated) < FLAT
