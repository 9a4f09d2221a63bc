"""The files of results: one JSON per question, in it one entry per run of a script, with its machine and versions."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click
import torch

from segm.eval.timing import environment
from segm.model.linear import processor_name
from segm.storage import write_text

RESULTS = Path(__file__).resolve().parents[1] / "results"
MACHINES = "machines"  # the file of the machines that entries name
PICTURES = "pictures"  # the folder beside the files
CPUINFO = Path("/proc/cpuinfo")
INSTRUCTIONS = {  # flag of Linux -> what the table of machines calls it
    "avx2": "AVX2",
    "avx512f": "AVX-512",
    "avx512_bf16": "AVX-512 bfloat16",
    "avx512_vnni": "AVX-512 int8",
    "amx_tile": "AMX",
}

Entry = dict[str, Any]

out_option = click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=RESULTS,
    show_default="results",
    help="Folder of results, where the run becomes an entry of the JSON file of its question.",
)


def read(question: str, folder: Path = RESULTS) -> list[Entry]:
    """The entries of a question, the oldest first; none where there is no file yet.

    Raises:
        ValueError: the file is damaged.
    """
    file = folder / f"{question}.json"
    if not file.exists():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        damaged = not isinstance(entries, list) or not all({"id", "machine", "rows"} <= {*entry} for entry in entries)
    except (ValueError, TypeError):
        damaged = True
    if damaged:
        raise ValueError(f"{file} is no file of results: mend it, or choose another folder with --out")
    return entries


def append(
    question: str,
    study: str,
    rows: Sequence[Mapping[str, Any]],
    device: torch.device,
    folder: Path = RESULTS,
    replaces: str | None = None,
    **conditions: Any,
) -> str:
    """Add a run to the file of a question, with machine, versions, command and date.

    Args:
        question: the file that answers it, without .json.
        study: what was measured; entries are numbered within it.
        rows: one mapping per row of a table.
        device: where it was measured.
        folder: of the file.
        replaces: id of an entry of the same run, with fewer rows; None: a new entry.
        conditions: all else that the rows depend on, as JSON takes it.

    Returns:
        The id of the entry, such as "benchmark-3". A run whose rows are there already is not added again.
    """
    entries = read(question, folder)
    # As they are read again: keys are texts, tuples are lists.
    kept = json.loads(json.dumps([dict(row) for row in rows], default=list))
    for entry in entries:
        if replaces is None and entry["id"].rpartition("-")[0] == study and entry["rows"] == kept:
            return entry["id"]
    numbers = [int(number) for name, _, number in (entry["id"].rpartition("-") for entry in entries) if name == study]
    known = replaces or f"{study}-{max(numbers, default=0) + 1}"
    new = {"id": known, "machine": machine(device, folder), **environment(device)}
    new |= {"date": datetime.now(UTC).date().isoformat(), "command": " ".join(sys.argv), **conditions, "rows": kept}
    write(question, [entry for entry in entries if entry["id"] != known] + [new], folder)
    return known


def write(question: str, entries: Sequence[Entry], folder: Path = RESULTS) -> None:
    """Write all entries of a question, a line per row, so that a new run is a short difference."""
    write_text(folder / f"{question}.json", "[\n" + ",\n".join(map(_text, entries)) + "\n]\n")


def _text(entry: Entry) -> str:
    head = _json({key: value for key, value in entry.items() if key != "rows"})
    rows = ",\n".join(f"  {_json(row)}" for row in entry["rows"])
    return f'{head[:-1]}, "rows": [\n{rows}\n]}}'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=list)


def machine(device: torch.device, folder: Path = RESULTS) -> str:
    """The name of this machine in the file of machines, M1 and so on; a new one is added."""
    found: dict[str, Any] = {"processor": processor_name(), "cores": os.cpu_count()}
    found["instructions"] = ", ".join(instructions())
    if device.type == "cuda":
        found = {"processor": torch.cuda.get_device_name(device), "cores": None, "instructions": "CUDA"}
    known = known_machines(folder)
    for one in known:
        if found.items() <= one.items():
            return one["machine"]
    known.append({"machine": f"M{len(known) + 1}", **found})
    write_text(folder / f"{MACHINES}.json", "[\n" + ",\n".join(map(_json, known)) + "\n]\n")
    return known[-1]["machine"]


def known_machines(folder: Path = RESULTS) -> list[dict[str, Any]]:
    """The machines that entries name: `machine`, `processor`, `cores`, `instructions`."""
    file = folder / f"{MACHINES}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else []


def instructions() -> list[str]:
    """The instructions of this processor that decide about speed; none where Linux does not list them."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set())
    return [name for flag, name in INSTRUCTIONS.items() if flag in flags]
