"""The trainer: order of data, where it goes on, precision, loss, annealing; from Python."""

import copy
import itertools
import math
import time

import pytest
import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import patch
from segm.checkpoint import load_checkpoint
from segm.config import RunConfig
from segm.data.loader import EpochSampler
from segm.data.shapes import ShapesDataset
from segm.losses import segmentation_loss
from segm.model.factory import create_segmenter
from segm.model.segmenter import compile_blocks
from segm.precision import Precision
from segm.resolve import resolve
from segm.run import Run
from segm.trainer import Trainer
from tests.helpers import by_speed

SMALL = {
    "dataset": "shapes", "backbone": "vit_tiny_patch16_384", "patch_size": 8, "d_model": 32, "n_heads": 2,
    "n_layers": 3, "im_size": 32, "crop_size": 32, "batch_size": 4, "epochs": 2, "eval_freq": 9, "learning_rate": 0.05,
    "num_workers": 0, "drop_path": 0.3,
}  # fmt: skip
STILL = {"drop_path": 0.0, "decoder_dropout": 0.0}  # nothing is random in an update
MEASURED = {"images_per_second": 0, "data_wait": 0, "memory_mb": 0}


@pytest.fixture(autouse=True)
def few_shapes(monkeypatch):
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 10, "val": 2})


@pytest.fixture
def create(tmp_path):
    """A trainer of a small network with dropout and drop path, so that random numbers matter."""

    def make(folder="run", *, resume=False, **settings):
        given = resolve(SMALL | settings)
        return Trainer(given, tmp_path / folder, device="cpu", weights=False, resume=resume)

    return make


def equal_weights(a, b):
    a, b = (getattr(one, "model", one).state_dict() for one in (a, b))
    return all(torch.equal(a[key], b[key]) for key in a)


class StoppedError(Exception):
    """A training ends."""


def stopping(trainer, step):
    """A trainer that writes a checkpoint and ends after a step."""
    real = trainer.train_step

    def train_step(batch):
        loss = real(batch)
        if trainer.step == step:
            trainer.save()
            raise StoppedError
        return loss

    trainer.train_step = train_step
    return trainer


def test_training_from_python_takes_three_lines(tmp_path):
    """And what it leaves is a run; no line is printed."""
    config = resolve(SMALL | {"patch_type": "graph", "threshold": 0.5, "layers": [1]})
    trainer = Trainer(config, tmp_path / "graph", device="cpu", weights=False).fit()
    run = Run.load(tmp_path / "graph", device="cpu")
    assert trainer.step == trainer.n_steps == 4 and trainer.is_finished and trainer.best >= 0
    assert (run.method, run.options["threshold"], run.n_cls) == ("graph", 0.5, 11)
    assert run.config == trainer.config


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_goes_on_where_it_was(create, workers):
    """With the same weights and the same entry, whatever happened to random numbers in between."""
    whole = create("whole", num_workers=workers, epochs=3)
    entries = record(whole)
    whole.fit()
    for step in (3,) if workers else (1, 2, 3, 4, 5):  # inside of epochs, and at their ends before the evaluation
        with pytest.raises(StoppedError):
            stopping(create(f"cut {step}", num_workers=workers, epochs=3), step).fit()
        torch.rand(7)
        resumed = create(f"cut {step}", num_workers=workers, epochs=3, resume=True)
        rest = record(resumed)
        resumed.fit()
        assert equal_weights(whole, resumed)
        assert [entry | MEASURED for entry in entries][-len(rest) :] == [entry | MEASURED for entry in rest]


def test_a_schedule_in_updates_goes_on_where_it_was(create):
    """Of three updates between evaluations, where two make a round through the images."""
    given = {"updates": 9, "eval_every": 3, "epochs": None, "eval_freq": None}
    whole = create("whole", **given)
    entries, seen = record(whole), []
    whole.say = seen.append
    whole.fit()
    assert whole.step == whole.n_steps == 9 and [entry["num_updates"] for entry in entries] == [3, 6, 9]
    assert all("mIoU" in line for line in seen) and seen[1].startswith("update 6/9")
    for step in (2, 3, 7):
        with pytest.raises(StoppedError):
            stopping(create(f"cut {step}", **given), step).fit()
        resumed = create(f"cut {step}", **given, resume=True)
        rest = record(resumed)
        resumed.fit()
        assert equal_weights(whole, resumed)
        assert [entry | MEASURED for entry in entries][-len(rest) :] == [entry | MEASURED for entry in rest]


def test_updates_and_epochs_are_two_words_for_one_training(create):
    """Whenever it is evaluated; what it has done is said in its own unit."""
    epochs = create("epochs", epochs=4).fit()
    for every in (4, 8):
        given = {"updates": 8, "eval_every": every, "epochs": None, "eval_freq": None}
        assert equal_weights(epochs, create(f"every {every}", **given).fit())
    finished, said = create("every 4", **given | {"eval_every": 4}, resume=True), []
    finished.say = said.append
    finished.fit()
    assert said == [f"{finished.log_dir} has finished its 8 updates: give more --updates to go on"]


def record(trainer):
    """The entries that a trainer writes."""
    entries, real = [], trainer._entry
    trainer._entry = lambda: entries.append(real()) or entries[-1]
    return entries


def test_a_resumed_training_of_other_batches_begins_its_epoch_anew(create, monkeypatch):
    with pytest.raises(StoppedError):
        stopping(create(), 3).fit()
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 14, "val": 2})
    resumed = create(resume=True)
    resumed.load(load_checkpoint(resumed.log_dir))
    assert (resumed.step, resumed.epoch, resumed.epoch_step) == (3, 1, 0)


def test_the_entry_says_what_happened(create):
    trainer = create()
    entries = record(trainer)
    trainer.fit()
    entry = entries[-1]
    assert entry["num_updates"] == 4 and entry["train_loss"] > 0 and entry["images_per_second"] > 0
    assert 1e-5 < entry["train_learning_rate"] < 0.05


def test_waiting_for_data_is_told(create, monkeypatch):
    real = ShapesDataset.load
    monkeypatch.setattr(ShapesDataset, "load", lambda self, index: time.sleep(0.1) or real(self, index))
    trainer = create(epochs=1)
    entries = record(trainer)
    trainer.fit()
    assert 80 < entries[-1]["data_wait"] < 100


def test_images_of_a_loss_that_is_not_finite_are_named(create, monkeypatch):
    losses = []

    def loss(logits, labels, n_labelled, share, **settings):
        losses.append(segmentation_loss(logits, labels, n_labelled))
        return losses[-1] * (math.nan if len(losses) == 2 else 1)

    monkeypatch.setattr("segm.losses.segmentation_loss", loss)
    trainer = create()
    names = [f"train_{index:05d}" for index in EpochSampler(10, 4).batch(1)]
    with pytest.raises(ValueError, match=", ".join(names)) as error:
        trainer.fit()
    assert "nan" in str(error.value) and "\n" not in str(error.value)
    assert not (trainer.log_dir / "checkpoint.pth").exists()


def overflowing(trainer, overflows):
    """A trainer in float16 with a loss that is infinite in some steps."""
    trainer.precision = Precision("cpu", torch.float16, torch.amp.GradScaler("cpu", init_scale=2.0**8))
    real = trainer.objective.forward

    def forward(*batch):
        loss, own = real(*batch)
        return loss * (math.inf if trainer.step in overflows else 1), own

    trainer.objective.forward = forward
    return trainer


def test_an_overflow_in_float16_costs_one_update(create):
    """The scaler leaves it out and goes on; an overflow that stays ends the training."""
    trainer = overflowing(create(epochs=3), {1})
    entries = record(trainer)
    trainer.fit()
    assert len(entries) == 3 and all(math.isfinite(entry["train_loss"]) for entry in entries)
    assert trainer.precision.scaler.get_scale() == 2.0**7
    assert all(value.isfinite().all() for value in trainer.model.state_dict().values())
    with pytest.raises(ValueError, match="the loss is inf"):
        overflowing(create("other", epochs=20), range(100)).fit()


def test_gradients_are_clipped(create):
    trainer, clipped = create("a", optimizer="sgd"), create("b", optimizer="sgd", clip_grad=1e-3)
    for one in (trainer, clipped):
        one.start_epoch()
        before = [p.clone() for p in one.model.parameters()]
        one.train_step(next(one.batches()))
        one.moved = sum((p - q).square().sum() for p, q in zip(one.model.parameters(), before, strict=True)).sqrt()
    assert clipped.moved <= 0.05 * 1.1e-3 < trainer.moved


def test_weights_of_classes_are_recorded(create, tmp_path):
    """They change what is learned, and a resumed run has them, whether its command names them again or not."""
    file, settings = tmp_path / "weights.yml", {"loss": "cross_entropy,dice"}
    file.write_text(str({name: index for index, name in enumerate(create("other").train_set.classes)}))
    whole = create("whole", class_weights=str(file), **settings).fit()
    assert whole.config.optim.class_weights == [float(index) for index in range(11)]
    with pytest.raises(StoppedError):
        stopping(create("cut", class_weights=str(file), **settings), 3).fit()
    for again in ({}, {"class_weights": str(file)}):
        config = resolve(again, RunConfig.read(tmp_path / "cut"), resume=True)
        resumed = Trainer(config, tmp_path / "cut", device="cpu", resume=True)
        assert resumed.config == whole.config
    assert equal_weights(whole, resumed.fit())
    weighted, plain = create("weighted", class_weights=str(file), **settings), create("plain", **settings)
    batch = uneven(plain)
    assert not torch.equal(weighted.train_step(batch), plain.train_step(batch))
    for text in ("[1, 2]", "{sky: 1}", "sky", str([-1] * 11), str([0] * 11)):
        file.write_text(text)
        with pytest.raises(ValueError, match="each of the 11 classes, sky, "):
            create("wrong", class_weights=str(file))
    with pytest.raises(ValueError, match="no pixel was counted"):
        create("wrong", class_weights="auto")


def test_weights_of_classes_come_from_their_pixels(create, folder_data, monkeypatch):
    monkeypatch.setenv("DATASET", str(folder_data))
    trainer = create(dataset="folder", class_weights="auto")
    pixels = [*trainer.config.data.inventory["train"]["pixels"].values()]
    expected = [sorted(pixels)[1] / count for count in pixels]
    assert trainer.config.optim.class_weights == pytest.approx(expected)


def test_averaged_weights_are_evaluated_and_saved(create):
    """They are the mean over updates, by hand; a training that is cut goes on with both kinds of weights."""
    settings = {
        "ema": 0.5,
        "accumulate": 2,
        "eval_freq": 1,
        "epochs": 3,
        "patch_type": "graph",
        "layers": [1],
        "threshold": 0.5,
    }
    settings |= {"start_thresh": 0.51, "curric_warmup": 1, "curric_period": 1}
    whole, expected = create("whole", **settings), None
    real, scored = whole.train_step, []
    whole.evaluate = lambda: scored.append(copy.deepcopy(whole.result.state_dict())) or {"mean_iou": 50.0}

    def train_step(batch):
        nonlocal expected
        loss, now = real(batch), whole.model.state_dict()
        expected = {k: now[k].clone() if expected is None else (expected[k] + now[k]) / 2 for k in now}
        return loss

    whole.train_step = train_step
    whole.fit()
    torch.testing.assert_close(dict(whole.result.state_dict()), expected)
    torch.testing.assert_close(dict(scored[-1]), expected)
    run = Run.load(whole.log_dir, device="cpu")
    torch.testing.assert_close(dict(run.model.state_dict()), expected)
    assert patch.options(whole.result)["threshold"] == 0.5 and not equal_weights(run, whole)
    with pytest.raises(StoppedError):
        stopping(create("cut", **settings), 3).fit()
    resumed = create("cut", resume=True, **settings).fit()
    assert equal_weights(whole, resumed) and equal_weights(whole.averaged.module, resumed.averaged.module)


def scoring(trainer, scores):
    """A trainer whose evaluations give these mIoU."""
    left = iter(scores)
    trainer.evaluate = lambda: {"mean_iou": next(left)}
    return trainer


def test_a_training_without_progress_ends(create):
    """With a word, and for good: it goes on where more patience is given."""
    settings = {"epochs": 9, "eval_freq": 1, "patience": 2}
    said = []
    trainer = scoring(create(**settings), [3.0, 4.0, 4.0, 2.0])
    trainer.say = said.append
    trainer.fit()
    assert (trainer.epoch, trainer.best, trainer.is_finished) == (4, 4.0, True)
    assert said[-1] == "ended after 4 epochs: no better mIoU in 2 evaluations (--patience)"
    again = create(resume=True, **settings)
    again.say, again.train_step = said.append, None
    again.fit()
    assert "ended early, after 4 epochs: give more --patience" in said[-1]
    more = scoring(create(resume=True, **settings | {"patience": 3}), [4.5, 1.0, 4.6, 1.0, 1.0]).fit()
    assert (more.epoch, more.best) == (9, 4.6)
    again = create(resume=True, **settings)
    again.say = said.append
    assert again.fit().n_worse == 2 and "has finished its 9 epochs" in said[-1]


def updated(trainer, batch):
    """Weights after one update with a batch."""
    trainer.start_epoch()
    trainer.train_step(batch)
    return trainer.model.state_dict()


def uneven(trainer):
    """A batch whose images have few labels, and different numbers of them."""
    trainer.start_epoch()
    batch = next(trainer.batches())
    batch["label"][:2, 2:], batch["label"][3] = 255, 255
    return batch


@pytest.mark.parametrize("clip_grad", [None, 1e-2])
def test_an_update_in_parts_is_that_of_the_whole_batch(create, clip_grad):
    """Also in float16 with a loss scaler, which halves its scale where a part overflows."""
    settings = STILL | {"clip_grad": clip_grad}
    whole, parts = create("whole", **settings), create("parts", accumulate=2, **settings)
    batch = uneven(whole)
    torch.testing.assert_close(updated(parts, batch), updated(whole, batch))
    assert parts.losses.tolist() == pytest.approx(whole.losses.tolist())
    scaled = overflowing(create("scaled", accumulate=2, **settings), {1})
    torch.testing.assert_close(updated(scaled, batch), whole.model.state_dict(), atol=2e-3, rtol=0.05)
    before = scaled.precision.scaler.get_scale()
    updated(scaled, batch)
    assert scaled.precision.scaler.get_scale() == before / 2


def test_parts_of_several_processes_make_the_update_of_one(create, tmp_path):
    """And processes exchange gradients once in an update."""
    whole = create("whole", **STILL)
    batch = uneven(whole)
    torch.multiprocessing.start_processes(update_half, (create, batch, tmp_path), nprocs=2, start_method="fork")
    expected = updated(whole, batch)
    for rank in range(2):
        weights, n_exchanges = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(weights, expected)
        assert n_exchanges == 1


def update_half(rank, create, batch, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    trainer, calls = create(f"half {rank}", accumulate=2, **STILL), []
    trainer._share()
    trainer.objective.register_comm_hook(None, lambda state, bucket: calls.append(1) or allreduce_hook(None, bucket))
    part = {name: values[2 * rank : 2 * rank + 2] for name, values in batch.items()}
    torch.save((updated(trainer, part), len(calls)), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize(("epochs", "n_images"), [(1, 40), (2, 4)])
def test_eomt_is_unmasked_in_the_end(create, monkeypatch, epochs, n_images):
    """However few epochs: annealing goes by updates. What goes on from it stays unmasked."""
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": n_images, "val": 1})
    settings = {"decoder": "eomt", "decoder_blocks": 2, "drop_path": 0.0, "epochs": epochs}
    trainer = create(**settings)
    seen, real = [], trainer.model.decoder.anneal
    trainer.model.decoder.anneal = lambda progress: (
        real(progress) or seen.append(trainer.model.decoder.mask_probs.tolist())
    )
    trainer.fit()
    assert len(seen) == trainer.n_steps and seen[-1] == [0.0, 0.0]
    assert all(b[0] <= a[0] and b[1] <= a[1] for a, b in itertools.pairwise(seen))
    if n_images == 40:
        assert seen[0] == [1.0, 1.0] and 0 < min(one[0] for one in seen if one[0]) < 1  # step by step
    tuned = Trainer(
        resolve({"epochs": 1, "num_workers": 0, "batch_size": 4}, trainer.config.for_finetuning()),
        trainer.log_dir.parent / "tuned",
        device="cpu",
        finetune=trainer.log_dir,
    )
    tuned.start_epoch()
    tuned.train_step(next(tuned.batches()))
    assert tuned.model.decoder.mask_probs.tolist() == [0.0, 0.0]


def test_checkpoints_of_another_training_are_refused(create):
    trainer = create().fit()
    state = load_checkpoint(trainer.log_dir)
    moments = state["optimizer"]["state"][0]["momentum_buffer"]
    for damage in (
        {"optimizer": state["optimizer"] | {"state": {0: {"momentum_buffer": moments.flatten()[1:]}}}},
        {"optimizer": state["optimizer"] | {"state": {0: {"momentum_buffer": "text"}}}},
        {"optimizer": state["optimizer"] | {"param_groups": []}},
        {"epoch": "3"},
        {"updates": -1},
        {"losses": "text", "updates": 1},
        {"best_mean_iou": None},
        {"evaluations_since_best": "text"},
    ):
        with pytest.raises(ValueError, match="cannot resume"):
            trainer.load(state | damage)


@pytest.mark.nightly
def test_a_batch_norm_sees_the_images_of_all_processes(tmp_path):
    """As one process that has them all: outputs, gradients, running statistics."""
    torch.manual_seed(0)
    x, weight = torch.randn(4, 3, 5, 5), torch.randn(4, 3, 5, 5)
    alone = nn.BatchNorm2d(3)
    expected = alone(x)
    (expected * weight).sum().backward()
    torch.multiprocessing.spawn(normalize_half, (tmp_path, x, weight), nprocs=2)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([one["y"] for one in found]), expected.detach())
    torch.testing.assert_close(found[0]["grad"] + found[1]["grad"], alone.weight.grad)
    for one in found:
        torch.testing.assert_close(one["state"], dict(alone.state_dict()))


@pytest.mark.nightly
def test_a_request_arrives_once_in_all_processes_after_the_next_update(tmp_path):
    """It is asked for twice, as a checkpoint that is due is until it is written."""
    torch.multiprocessing.spawn(exchange_requests, (tmp_path,), nprocs=2)
    for rank in range(2):
        assert torch.load(tmp_path / f"{rank}.pt") == [0, 0, 1, 0, 0, 143]


def exchange_requests(rank, folder):
    from segm import parallel

    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    requests = parallel.Requests()
    mine = (0, 1, 1, 0, 0, 0) if rank == 0 else (0, 0, 0, 0, 143, 143)
    torch.save([requests.exchange(number) for number in mine], folder / f"{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def normalize_half(rank, folder, x, weight):
    from segm import parallel

    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    norm = parallel.synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(3)), torch.device("cpu"))[0]
    part = slice(2 * rank, 2 * rank + 2)
    y = norm(x[part])
    (y * weight[part]).sum().backward()
    found = {"y": y.detach(), "grad": norm.weight.grad, "state": dict(norm.state_dict())}
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("method", by_speed(["graph", "tome"]))
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


@pytest.mark.parametrize("amp", [False, True])
def test_the_loss_falls(create, amp):
    trainer = create(amp=amp, epochs=4)
    entries = record(trainer)
    trainer.fit()
    assert entries[-1]["train_loss"] < entries[0]["train_loss"]


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


def test_every_image_is_seen_once_per_epoch_in_another_order():
    sampler = EpochSampler(10, 5)
    epochs = []
    for epoch in range(2):
        sampler.epoch = epoch
        pairs = list(sampler)
        assert {e for e, _ in pairs} == {epoch} and sorted(i for _, i in pairs) == list(range(10))
        epochs.append([i for _, i in pairs])
    assert epochs[0] != epochs[1]


def test_the_order_is_that_of_rounds_however_long_an_epoch_is():
    def order(n_epochs, **length):
        sampler, pairs = EpochSampler(10, 4, **length), []
        for sampler.epoch in range(n_epochs):
            pairs += [*sampler]
        return pairs

    assert order(6) == order(4, n_batches=3) == order(12, n_batches=1)  # a round has two batches


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
