"""Everything is declared in pyproject.toml, as the wheel has it: all below `g2tm`. Two things are said here.

The checkout imports `patch`, `segm` and `vis` by these names, which are those of other projects on PyPI, too. What is
built has them below `g2tm`, so its import statements are written anew; an editable install is of the checkout.
"""

import ast
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel

ROOMS = ("patch", "segm", "vis")


class Build(build_py):
    """Builds from nothing, since a folder of an earlier build would go into the wheel, and moves imports."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()

    def build_module(self, module: str, module_file: str, package: str) -> tuple[str, bool]:
        outfile, copied = super().build_module(module, module_file, package)
        moved = below_g2tm(Path(outfile).read_bytes())
        Path(outfile).unlink()  # it may be as read-only as its source
        Path(outfile).write_bytes(moved)
        return outfile, copied


class Editable(editable_wheel):
    """Installs the folders of the checkout under their own names."""

    def finalize_options(self) -> None:
        site = Path(sysconfig.get_paths()["purelib"])
        for name in ROOMS:
            for other in (site / name, site / f"{name}.py"):
                if other.exists():
                    raise SystemExit(
                        f"{other} is another project with the import name of ours: uninstall it, or take a new "
                        "environment; without --editable, both live side by side"
                    )
        packages = [name.removeprefix("g2tm.") for name in self.distribution.packages]
        self.distribution.packages = [name for name in packages if name.split(".")[0] in ("g2tm", *ROOMS)]
        self.distribution.package_dir, self.distribution.py_modules = {}, None
        super().finalize_options()


def below_g2tm(source: bytes) -> bytes:
    """A module of the checkout as it is below `g2tm`: its import statements changed, all else as it was."""
    lines = source.splitlines(keepends=True)
    for line, column, text in sorted(insertions(ast.parse(source), lines), reverse=True):
        lines[line - 1] = lines[line - 1][:column] + text + lines[line - 1][column:]
    return b"".join(lines)


def insertions(tree: ast.Module, lines: list[bytes]) -> Iterator[tuple[int, int, bytes]]:
    """Line, from 1, column, in bytes, and text of all that is inserted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and node.module.split(".")[0] in ROOMS:
            start = lines[node.lineno - 1].index(node.module.encode(), node.col_offset)
            yield node.lineno, start, b"g2tm."
        elif isinstance(node, ast.Import):
            for name in node.names:
                room = name.name.split(".")[0]
                if room in ROOMS:
                    yield name.lineno, name.col_offset, b"g2tm."
                    if not name.asname:  # `import patch.methods` binds `patch`
                        more = f", g2tm.{room}" if "." in name.name else ""
                        yield name.end_lineno, name.end_col_offset, f"{more} as {room}".encode()


if __name__ == "__main__":
    setup(cmdclass={"build_py": Build, "editable_wheel": Editable})
