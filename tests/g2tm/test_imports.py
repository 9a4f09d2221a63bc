"""The cost of importing the merging methods."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import sys, numpy, torch
before = set(sys.modules)
import g2tm.api
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""


def test_g2tm_imports_torch_and_numpy_alone():
    run = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(run.stdout.split()) - set(sys.stdlib_module_names) <= {"g2tm", "torch", "numpy"}


def test_types_are_shipped():
    assert (ROOT / "g2tm/py.typed").exists()
