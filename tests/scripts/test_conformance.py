"""Conformance vectors: every case holds, and the command finds out what does not."""

import importlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import save_file

DATA = Path(__file__).parents[1] / "data"
FILES = sorted(DATA.glob("*.safetensors"))


SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="module")
def conformance():
    sys.path.insert(0, str(SCRIPTS))  # as Python does for a script
    yield importlib.import_module("conformance")
    sys.path.remove(str(SCRIPTS))


def changed(name, folder, change):
    """A copy of a file of vectors, in which tensors or parameters were changed."""
    with safe_open(DATA / name, "pt") as opened:
        tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        header = opened.metadata() or {}
    tensors, header = change(tensors, header)
    save_file(tensors, folder / name, header)
    for other in ("checkpoint.pth", "variant.yml"):
        shutil.copy(DATA / other, folder)
    return folder / name


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_case_holds(conformance, file):
    cases = conformance.find_cases(file)
    assert len(cases) >= {"cases": 37, "clustvit": 14, "opentome_a": 18, "opentome_b": 31}[file.stem]
    assert {case.name: reason for case in cases if (reason := conformance.failure(case))} == {}


def test_every_output_that_is_wrong_is_found(conformance, tmp_path):
    """Every tensor that a case is held against, one at a time, by an amount that matters."""
    inputs = (".metric", ".x", ".size", ".attn", ".importance", ".cotangent", ".h")
    source = DATA / "opentome_b.safetensors"
    with safe_open(source, "pt") as opened:
        names = [name for name in opened.keys() if not (name.startswith("n") and name.endswith(inputs))]  # noqa: SIM118
    outputs = [n for n in names if n.endswith((".x", ".size", ".assignment", ".mask", ".restored", "_grad", ".gflops"))]
    for name in outputs[::7]:

        def change(tensors, header, name=name):
            tensors[name] = tensors[name].roll(1, -1) + (1 if tensors[name].is_floating_point() else 0)
            return tensors, header

        file = changed(source.name, tmp_path, change)
        assert any(conformance.failure(case) for case in conformance.find_cases(file)), name


def test_the_command_names_what_fails(conformance, tmp_path, call):
    assert "atc: 4 of 4 hold" in call(conformance, DATA / "opentome_b.safetensors")

    def change(tensors, header):
        parameters = json.loads(header["cases"])
        parameters["pitome.n65.bsm.r8.m0.75"]["margin"] = -0.3
        return tensors, {"cases": json.dumps(parameters)}

    file = changed("opentome_a.safetensors", tmp_path, change)
    result = CliRunner().invoke(conformance.main, [str(file)])
    assert result.exit_code == 1 and "pitome: 3 of 4 hold" in result.stdout
    assert "pitome.n65.bsm.r8.m0.75: the assignment differs in" in result.stdout


def test_files_that_it_does_not_know_are_refused(conformance, tmp_path, refused):
    save_file({"other.x": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert "holds other, which no check knows" in refused(conformance, tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    assert "is no .safetensors file" in refused(conformance, tmp_path / "broken.safetensors")
    file = changed("opentome_a.safetensors", tmp_path, lambda tensors, header: (tensors, {}))
    assert "the header lacks `cases`" in refused(conformance, file)
