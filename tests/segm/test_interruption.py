"""Trainings that are killed, asked to end, or started twice: nothing is lost, and nothing changes."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from segm import train, trainer
from segm.checkpoint import load_checkpoint
from tests.forked import printed
from tests.helpers import by_speed

NETWORK = ["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--device", "cpu", "--dataset", "shapes"]
NETWORK += ["--patch-size", "8", "--d-model", "32", "--n-heads", "2", "--n-layers", "2", "--batch-size", "4"]
NETWORK += ["--im-size", "64", "--crop-size", "64", "--window-size", "64", "--window-stride", "64"]
NETWORK += ["--learning-rate", "0.01", "--dropout", "0.1", "--drop-path", "0.1", "--epochs", "4"]
MEASURED = ("images_per_second", "data_wait", "memory_mb")
OFTEN = ["--save-every", "0.0001"]  # after every update


@pytest.fixture
def start(forked):
    """Start a training; returns its process."""

    def run(folder, *options):
        return forked.start("segm.train", "--log-dir", folder, *NETWORK, *OFTEN, *options, output=folder)

    return run


def wait_for(what, seconds=60):
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.005)


def saves(folder, count, process=None):
    """Wait until a training has saved so many times more, or its process has ended."""
    file = folder / "checkpoint.pth"
    seen = file.stat().st_mtime_ns if file.exists() else 0
    for _ in range(count):
        wait_for(
            lambda: (
                (file.exists() and file.stat().st_mtime_ns != seen)  # noqa: B023
                or (process is not None and not process.is_alive())
            )
        )
        seen = file.stat().st_mtime_ns


def children(pid):
    """Numbers of the living processes that a process has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = dict(line.split(":\t", 1) for line in status.read_text().splitlines() if ":\t" in line)
        except OSError:
            continue
        if text["PPid"].strip() == str(pid) and not text["State"].startswith("Z"):
            found.append(int(status.parent.name))
    return found


def left_behind(folder):
    """All that a training leaves: tensors of both checkpoints, and the log without what a clock measured."""
    kept = {name: flat(torch.load(folder / name)) for name in ("checkpoint.pth", "checkpoint_best.pth")}
    log = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return kept, [{key: value for key, value in entry.items() if key not in MEASURED} for entry in log]


def flat(value, name=""):
    """Nested dicts and lists as one dict; tensors as bytes."""
    if isinstance(value, torch.Tensor):
        return {name: value.numpy().tobytes()}
    if isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: one for name_, inner in items for key, one in flat(inner, f"{name}.{name_}").items()}
    return {name: value}


@pytest.fixture(scope="module")
def whole(forked, tmp_path_factory):
    """What an uninterrupted training leaves; the same with and without workers."""
    folders = [tmp_path_factory.mktemp("whole") / str(workers) for workers in (0, 2)]
    for folder in folders:
        options = [*NETWORK, *OFTEN, "--num-workers", folder.name]
        process = forked.start("segm.train", "--log-dir", folder, *options, output=folder)
        process.join(120)
        assert process.exitcode == 0, printed(folder)
    expected = left_behind(folders[0])
    assert left_behind(folders[1]) == expected and len(expected[1]) == 4
    return expected


@pytest.mark.parametrize(("workers", "kills"), by_speed([(0, 1), (2, 1), (0, 12), (2, 12)]))
def test_killed_trainings_end_as_uninterrupted_ones(start, whole, tmp_path, workers, kills):
    chance, folder = random.Random(kills), tmp_path / "run"
    for _ in range(kills):
        process = start(folder, "--num-workers", workers, "--resume")
        saves(folder, chance.randint(1, 9), process)
        time.sleep(chance.random() / 50)
        mine = children(process.pid)
        process.kill()
        process.join()
        wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in mine), 10)  # noqa: B023
    process = start(folder, "--num-workers", workers, "--resume")
    process.join(120)
    assert process.exitcode == 0
    assert left_behind(folder) == whole
    assert not list(folder.glob("*.part"))


@pytest.mark.parametrize(
    ("number", "to_all"),
    by_speed([(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)], slow=[(signal.SIGTERM, False)]),
)
def test_signals_end_a_training_well(start, whole, tmp_path, number, to_all):
    """SIGTERM to the training, Ctrl-C to all of its processes."""
    folder = tmp_path / "run"
    process = start(folder, "--num-workers", "2")
    saves(folder, 3)
    mine = children(process.pid)
    assert len(mine) >= 2
    for pid in [process.pid, *(mine if to_all else ())]:
        os.kill(pid, number)
    process.join(30)
    text = "".join(printed(folder))
    assert process.exitcode == 128 + number, text
    assert "checkpoint.pth" in text and "--resume" in text and "Traceback" not in text
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in mine), 10)
    process = start(folder, "--num-workers", "2", "--resume")
    process.join(120)
    assert left_behind(folder) == whole
    process = start(folder, "--resume")
    process.join(60)
    assert process.exitcode == 0 and "finished" in "".join(printed(folder))


@pytest.mark.nightly
def test_two_processes_go_on_where_they_were(forked, tmp_path):
    def pair(name):
        options = [*NETWORK, *OFTEN, "--num-workers", "0", "--epochs", "2", "--resume"]
        return forked.together(2, "segm.train", "--log-dir", tmp_path / name, *options, output=tmp_path / name)

    for process in pair("whole"):
        process.join(120)
        assert process.exitcode == 0, printed(tmp_path / "whole")
    processes = pair("cut")
    saves(tmp_path / "cut", 3)
    for process in processes:
        process.kill()
        process.join()
    assert load_checkpoint(tmp_path / "cut")["updates"] > 0
    processes = pair("cut")
    saves(tmp_path / "cut", 1)
    os.kill(processes[1].pid, signal.SIGTERM)  # one is asked, both end after the same update
    for process in processes:
        process.join(30)
        assert process.exitcode == 128 + signal.SIGTERM
    for process in pair("cut"):
        process.join(120)
        assert process.exitcode == 0
    assert left_behind(tmp_path / "cut") == left_behind(tmp_path / "whole")


def test_a_signal_during_the_evaluation_loses_nothing(tmp_path, monkeypatch, call):
    """And what was evaluated halfway is evaluated anew."""
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 8, "val": 3})
    options = [*NETWORK, "--num-workers", "0", "--epochs", "2", "--eval-freq", "1"]
    call(train, "--log-dir", tmp_path / "whole", *options)
    real = trainer.evaluate

    def interrupted(*args, **kwargs):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(trainer, "evaluate", interrupted)
    status, output = status_of("--log-dir", tmp_path / "cut", *options)
    assert status == 128 + signal.SIGTERM and "evaluation" in output
    state = load_checkpoint(tmp_path / "cut")
    assert (state["epoch"], state["updates"]) == (-1, 2) and not (tmp_path / "cut/log.txt").exists()
    monkeypatch.setattr(trainer, "evaluate", real)
    call(train, "--log-dir", tmp_path / "cut", *options, "--resume")
    assert left_behind(tmp_path / "cut") == left_behind(tmp_path / "whole")


def status_of(*arguments):
    from click.testing import CliRunner

    result = CliRunner().invoke(train.main, [str(argument) for argument in arguments])
    return result.exit_code, result.output


def test_a_run_directory_has_one_writer(tmp_path, monkeypatch, refused):
    monkeypatch.setattr("segm.runlog.PATIENCE", 0.1)
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 4, "val": 1})
    (tmp_path / "run").mkdir()
    with FileLock(tmp_path / "run/.lock"):
        assert "another training" in refused(train, "--log-dir", tmp_path / "run", *NETWORK, "--num-workers", "0")
    assert not (tmp_path / "run/checkpoint.pth").exists()


def test_a_torn_log_costs_its_lines_only(tmp_path, monkeypatch, call):
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 4, "val": 1})
    options = ["--log-dir", tmp_path, *NETWORK, "--num-workers", "0"]
    call(train, *options, "--epochs", "2")
    log = tmp_path / "log.txt"
    first, second = log.read_bytes().splitlines()
    log.write_bytes(
        b"\n".join([first, b"\xff\x00", b"[]", b'{"epoch": "x"}', b"", b"[" * 5000, second[: len(second) // 2]])
    )
    call(train, *options, "--resume", "--epochs", "3")
    assert [json.loads(line)["epoch"] for line in log.read_text().splitlines()] == [0, 2]
