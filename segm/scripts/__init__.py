"""Released names of the scripts that prepare data sets; the scripts themselves lie in `scripts` of the checkout."""

import runpy
import sys
from pathlib import Path


def forward(name: str) -> None:
    """Run a script of the checkout with the arguments of this process."""
    folder = Path(__file__).parents[2] / "scripts"
    sys.path.insert(0, str(folder))  # where it finds what scripts share
    runpy.run_path(str(folder / name), run_name="__main__")
