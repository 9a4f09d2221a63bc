"""The files of results: a run becomes an entry, with its machine, and nothing of the others changes."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "scripts"
CPU = torch.device("cpu")


@pytest.fixture
def results(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    yield importlib.import_module("results_file")
    del sys.modules["results_file"]


def test_runs_are_entries_with_machine_command_and_date(results, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scripts/benchmark.py", "--models", "T"])
    rows = [{"method": "graph", "tokens": 690.5, "settings": {"layers": (2,)}, "overhead": {2: 0.01}}]
    assert results.append("time", "benchmark", rows, CPU, tmp_path, images="shapes") == "benchmark-1"
    (entry,) = results.read("time", tmp_path)
    assert entry["rows"] == [rows[0] | {"settings": {"layers": [2]}, "overhead": {"2": 0.01}}]
    assert entry["machine"] == "M1" and entry["command"] == "scripts/benchmark.py --models T"
    assert entry["images"] == "shapes" and entry["torch"] == torch.__version__ and len(entry["date"]) == 10
    (machine,) = results.known_machines(tmp_path)
    assert machine["machine"] == "M1" and machine["cores"] > 0 and machine["processor"]


def test_an_entry_grows_and_others_stay(results, tmp_path):
    first = results.append("time", "benchmark", [{"method": "graph"}], CPU, tmp_path)
    before = results.read("time", tmp_path)
    second = results.append("time", "benchmark", [{"method": "tome"}], CPU, tmp_path)
    grown = [{"method": "tome"}, {"method": "algm"}]
    assert results.append("time", "benchmark", grown, CPU, tmp_path, second) == second
    assert results.append("time", "profile", [{"method": "graph"}], CPU, tmp_path) == "profile-1"
    entries = results.read("time", tmp_path)
    assert [entry["id"] for entry in entries] == [first, "benchmark-2", "profile-1"]
    assert entries[:1] == before and entries[1]["rows"] == grown


def test_the_same_rows_are_not_added_twice(results, tmp_path):
    rows = [{"method": "graph", "layers": (1, 5)}]
    first = results.append("size", "frontier", rows, CPU, tmp_path)
    text = (tmp_path / "size.json").read_text()
    assert results.append("size", "frontier", rows, CPU, tmp_path) == first
    assert (tmp_path / "size.json").read_text() == text


def test_another_machine_gets_the_next_name(results, tmp_path, monkeypatch):
    assert results.machine(CPU, tmp_path) == results.machine(CPU, tmp_path) == "M1"
    monkeypatch.setattr(results, "processor_name", lambda: "Another")
    assert results.machine(CPU, tmp_path) == "M2"
    assert [one["machine"] for one in results.known_machines(tmp_path)] == ["M1", "M2"]


def test_instructions_are_those_that_linux_lists(results, tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("model name\t: A\nflags\t\t: fpu avx2 avx512f amx_tile\n")
    monkeypatch.setattr(results, "CPUINFO", file)
    assert results.instructions() == ["AVX2", "AVX-512", "AMX"]
    monkeypatch.setattr(results, "CPUINFO", tmp_path / "none")
    assert results.instructions() == []


def test_a_line_per_row(results, tmp_path):
    results.append("time", "benchmark", [{"a": 1}, {"a": "µs"}], CPU, tmp_path)
    lines = (tmp_path / "time.json").read_text().splitlines()
    assert lines[2:4] == ['  {"a": 1},', '  {"a": "µs"}'] and len(lines) == 6


@pytest.mark.parametrize("content", ["{", "{}", "[1]", '[{"id": "a-1"}]'])
def test_a_damaged_file_is_refused_and_kept(results, tmp_path, content):
    file = tmp_path / "time.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=r"time\.json is no file of results: mend it, or choose another folder"):
        results.append("time", "benchmark", [{"a": 1}], CPU, tmp_path)
    assert file.read_text() == content
