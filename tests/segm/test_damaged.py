"""Files that are damaged, foreign or hostile: one line that names them, never a traceback, never more than that."""

import random
import re
import shutil

import cv2
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner

from segm import inference, report, test, train
from segm.checkpoint import save_checkpoint
from segm.config import RunConfig, config_dir
from segm.data import create_dataset
from segm.data.folder import read_classes
from segm.trainer import Trainer
from tests.helpers import by_speed

NETWORK = ["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--num-workers", "0", "--device", "cpu"]
NETWORK += ["--patch-size", "8", "--d-model", "32", "--n-heads", "2", "--n-layers", "2", "--batch-size", "2"]
NETWORK += ["--im-size", "32", "--crop-size", "32", "--dataset", "shapes"]
# What stands for a value now and then: of other types, far out of range, or nothing.
ODD = [None, [], {}, "", "text", "64", -1, 0, 1.5, 10**400, 1e308, float("nan"), float("inf"), True, [1, "a"], {"a": 1}]
ODD += ["\x00", "é" * 300, [[]], {1: 2}, -(10**30), "2024-01-01", [None], 7]
FEW = ["--cost-images", "1", "--max-images", "1", "--pictures", "0", "--explore", "0", "--device", "cpu"]
LONGEST = 2100  # characters of a message


@pytest.fixture(scope="module")
def run(tmp_path_factory, call):
    """A finished training."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as context:
        context.setattr("segm.data.shapes.LENGTHS", {"train": 4, "val": 1})
        graph = ["--patch-type", "graph", "--selected-layer", "1", "--threshold", "0.9"]
        call(train, "--log-dir", folder, *NETWORK, *graph, "--epochs", "2", "--eval-freq", "1")
    return folder


@pytest.fixture
def photos(tmp_path):
    """A folder with one photograph."""
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/a.png"), np.zeros((40, 48, 3), np.uint8))
    return tmp_path / "photos"


def outcome(command, *arguments):
    """What a command says of its failure, one line of bounded length; empty where it ends well."""
    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    if result.exit_code:
        errors = result.stderr[result.stderr.index("Error: ") :].strip()
        assert "\n" not in errors and len(errors) < LONGEST, errors[:2000]
    return result.stderr if result.exit_code else ""


def mutated(content, chance):
    """Bytes changed, cut out, doubled or put in."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(content) + 1)
        end = min(at + chance.randint(1, 40), len(content))
        kind = chance.randrange(5)
        if kind == 0 and at < len(content):
            content[at] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del content[at:end]
        elif kind == 2:
            content[at:at] = content[at:end]
        elif kind == 3:
            content[at:at] = bytes(chance.randrange(256) for _ in range(chance.randint(1, 8)))
        else:
            del content[at:]
    return bytes(content)


def odd(value, chance, share):
    """The same nested value, some parts of it replaced, left out or renamed."""
    if chance.random() < share:
        return chance.choice(ODD)
    if isinstance(value, dict):
        return {
            (f"{key}?" if chance.random() < share / 4 else key): odd(inner, chance, share)
            for key, inner in value.items()
            if chance.random() > share / 2
        }
    if isinstance(value, list):
        return [odd(inner, chance, share) for inner in value if chance.random() > share / 2]
    return value


def damaged_texts(text, count, seed):
    """YAML texts: half of them damaged by bytes, half of them well-formed with odd values."""
    chance = random.Random(seed)
    for index in range(count):
        if index % 2:
            yield mutated(text.encode(), chance)
        else:
            yield yaml.safe_dump(odd(yaml.safe_load(text), chance, chance.choice([0.02, 0.1]))).encode()


@pytest.mark.parametrize("count", by_speed([15, 600], slow=[15]))
def test_damaged_variant_files(count, run, tmp_path, photos, monkeypatch):
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 4, "val": 1})
    monkeypatch.setattr(Trainer, "fit", lambda self: self)
    shutil.copytree(run, tmp_path / "run")
    file = tmp_path / "run/variant.yml"
    n_failed = 0
    for index, content in enumerate(damaged_texts(file.read_text(), count, 0)):
        file.write_bytes(content)
        n_failed += outcome(inference, tmp_path / "run", "-i", photos, "-o", tmp_path / "out", "--device", "cpu") != ""
        outcome(test, tmp_path / "run", "--device", "cpu", "--max-images", "1")
        outcome(train, "--log-dir", tmp_path / "run", "--resume", "--device", "cpu")
        if index % 10 == 0:
            outcome(report, tmp_path / "run", *FEW, "--out", tmp_path / "page.html")
    assert n_failed > count / 6


@pytest.mark.parametrize("count", by_speed([12, 240], slow=[12]))
def test_damaged_logs(count, run, tmp_path, monkeypatch):
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 4, "val": 1})
    shutil.copytree(run, tmp_path / "run")
    content, chance = (run / "log.txt").read_bytes(), random.Random(1)
    for index in range(count):
        (tmp_path / "run/log.txt").write_bytes(mutated(content, chance))
        if index % 8:
            entries = report.read_log(tmp_path / "run/log.txt")
            assert all(isinstance(entry["epoch"], int) for entry in entries)
        else:
            assert outcome(report, tmp_path / "run", *FEW, "--out", tmp_path / "page.html") == ""
            assert outcome(train, "--log-dir", tmp_path / "run", "--resume", "--device", "cpu") == ""


@pytest.mark.parametrize("count", by_speed([12, 300], slow=[12]))
def test_damaged_checkpoints_are_not_resumed(count, run, tmp_path, monkeypatch):
    """Neither are well-formed ones with odd values in the place of others."""
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 4, "val": 1})
    chance, whole = random.Random(2), torch.load(run / "checkpoint.pth")
    content = (run / "checkpoint.pth").read_bytes()
    small = [torch.zeros(0), torch.zeros(1), torch.zeros(2, 2, dtype=torch.long), torch.tensor(float("nan"))]
    for index in range(count):
        folder = tmp_path / str(index)
        folder.mkdir()
        shutil.copy(run / "variant.yml", folder)
        if index % 3 == 0:
            (folder / "checkpoint.pth").write_bytes(mutated(content, chance))
        else:
            state = dict(whole)
            for _ in range(chance.randint(1, 2)):
                place, key = state, chance.choice(list(state))
                while isinstance(place[key], dict) and place[key] and chance.random() < 0.7:
                    place[key] = dict(place[key])
                    place = place[key]
                    key = chance.choice(list(place))
                if chance.random() < 0.3:
                    del place[key]
                else:
                    place[key] = chance.choice([*small, *ODD])
                if not state:
                    break
            save_checkpoint(state, folder / "checkpoint.pth")
        outcome(train, "--log-dir", folder, "--resume", "--device", "cpu", "--epochs", "3")
        assert not list(folder.glob("*.part"))
        shutil.rmtree(folder)


@pytest.mark.parametrize("count", by_speed([15, 400], slow=[15]))
def test_damaged_recipes(count, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: self)
    recipe = (config_dir() / "recipes/ade20k_512_tiny_graph.yml").read_text()
    for content in damaged_texts(recipe, count, 3):
        (tmp_path / "recipe.yml").write_bytes(content)
        outcome(train, "--log-dir", tmp_path / "run", "--config", tmp_path / "recipe.yml", *NETWORK)


@pytest.mark.parametrize("count", by_speed([30, 300], slow=[30]))
def test_damaged_class_lists(count, tmp_path):
    entries = [{"id": index, "name": f"class {index}", "color": [index, 2 * index, 255]} for index in range(5)]
    for text in (yaml.safe_dump(entries), "[floor, wall, door, no, 1]"):
        for content in damaged_texts(text, count, 4):
            (tmp_path / "classes.yml").write_bytes(content)
            try:
                found = read_classes(tmp_path / "classes.yml")
            except ValueError as error:
                assert str(tmp_path / "classes.yml") in str(error)
                assert "\n" not in str(error) and len(str(error)) < LONGEST
            else:
                assert all(isinstance(name, str) and name for name in found.metainfo["classes"])


def test_nested_aliases_cost_nothing(run, tmp_path):
    """Each line refers nine times to the one before: 9⁹ values in 1.4 kB."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    shutil.copytree(run, tmp_path / "run")
    for text in ("\n".join([*lines, "net_kwargs: {n_cls: *a29}"]), "net_kwargs: &n {n_cls: 2, decoder: *n}"):
        (tmp_path / "run/variant.yml").write_text(text)
        with pytest.raises(ValueError, match=r"variant\.yml") as error:
            RunConfig.read(tmp_path / "run")
        assert len(str(error.value)) < LONGEST
        assert outcome(test, tmp_path / "run", "--device", "cpu")


@pytest.mark.parametrize("count", by_speed([10, 60], slow=[10]))
def test_damaged_files_are_named(count, tmp_path, monkeypatch):
    """A data set that is damaged in one file says which."""
    monkeypatch.setenv("DATASET", str(tmp_path))
    for kind in ("images", "annotations"):
        (tmp_path / kind / "train").mkdir(parents=True)
        cv2.imwrite(str(tmp_path / kind / "train/a.png"), np.zeros((20, 20), np.uint8))
    (tmp_path / "classes.yml").write_text("[a, b]")
    content, chance = (tmp_path / "annotations/train/a.png").read_bytes(), random.Random(5)
    for _ in range(count):
        (tmp_path / "annotations/train/a.png").write_bytes(mutated(content, chance))
        dataset = create_dataset("folder", "train")
        try:
            assert dataset[0].label.shape == (20, 20)
        except ValueError as error:
            assert re.search(r"annotations/train/a\.png", str(error)) and "\n" not in str(error)
