"""Everything is declared in pyproject.toml. What stands here keeps two projects from overwriting each other."""

import sysconfig
from pathlib import Path

from setuptools import setup

OTHER = Path(sysconfig.get_paths()["purelib"]) / "patch.py"  # of the project `patch` on PyPI
if OTHER.exists():
    raise SystemExit(
        f"{OTHER} is another project with the import name of ours: pip uninstall patch, or take a new environment"
    )
setup()
