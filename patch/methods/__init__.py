"""The built-in methods: one function of `g2tm` and one registry entry each; and those of installed packages."""

import warnings
from importlib import import_module
from importlib.metadata import entry_points
from pkgutil import iter_modules

# Importing a file fills the registry; `--patch-type` offers the methods in this order, then those of any other file.
# isort: off
from patch.methods import keymatch, graph, algm, mpm, random_merge, tome, tofu, dct, pitome, mctf, crossget  # noqa: F401
from patch.methods import atc, dtem, diffrate, ltmp, fpet, clustvit, expedit, cubist  # noqa: F401

for file in iter_modules(__path__):
    import_module(f"{__name__}.{file.name}")

for entry in entry_points(group="g2tm.methods"):  # of modules that register methods
    try:
        entry.load()
    except Exception as error:  # whatever is wrong with another package, the built-in methods work
        warnings.warn(f"{entry.name} = {entry.value} registers no method: {error}", stacklevel=2)
