"""Assembles the documentation site behind `make docs`: the documents of the repository, a page per method, notebooks.

mkdocs then builds it, executes the notebooks and checks all links.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
import yaml

import patch
from segm.cli import Command, markdown
from segm.data import create_dataset
from segm.errors import one_line
from segm.merging import PURE
from segm.run import Run
from segm.storage import write_picture, write_text
from vis import fill_tokens, outline_tokens, picture_sheet

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "TRAINING.md": "training.md",
    "RESULTS.md": "results.md",
    **{f"results/{file.name}": f"results/{file.name}" for file in sorted((ROOT / "results").glob("*.md"))},
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
}
LINKS = PAGES | {"LICENSE": "licenses.md", "docs/comparison.md": "comparison.md"}
ENTRY = re.compile(r"@\w+\{(\w+),\n(.*?)\n\}", re.DOTALL)
N_SCENES = 3
# Settings with which the small model of the pictures merges about half of its tokens.
PICTURED: dict[str, dict[str, Any]] = {
    "keymatch": {"layers": [1, 2]},
    "graph": {"threshold": 0.97},
    "algm": {"layers": [1, 3], "threshold": 0.9},
    **{name: {"r": 32} for name in ("tome", "tofu", "pitome", "mctf", "crossget", "diffrate")},
    "atc": {"layers": [2]},
    "ltmp": {"merge_threshold": 0.998},
    "mpm": {"layers": [1, 3]},
    "fpet": {},
    "cubist": {"tokens": 0.5},
    "random": {},
}


@click.command(cls=Command)
@click.option("--run", "run_path", type=click.Path(exists=True, path_type=Path), help="Draws the merged tokens.")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="build/docs", show_default=True)
def main(run_path: Path | None, out: Path) -> None:
    """Write the pages to OUT, and build the site beside it.

    Without --run, the pages of methods have no pictures of merged tokens.
    """
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(ROOT / "docs", out, ignore=shutil.ignore_patterns("*.yml"))
    for name, page in PAGES.items():
        write_text(out / page, linked((ROOT / name).read_text(encoding="utf-8")))
    for picture in (ROOT / "results").rglob("*.png"):
        target = out / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)
    pictured = draw_methods(Run.load(run_path, patch_type=PURE), out / "methods") if run_path is not None else set()
    write_methods(out / "methods", pictured)
    command = [sys.executable, "-m", "mkdocs", "build"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError("mkdocs found faults, see above")


def linked(text: str) -> str:
    """A document with links to the pages of the site in place of those to files of the repository."""
    for name, page in LINKS.items():
        text = re.sub(rf"\]\((\.\./)?{re.escape(name)}(#[\w-]+)?\)", rf"](\g<1>{page}\2)", text)
    return text


def write_methods(folder: Path, pictured: set[str]) -> None:
    """A page per method, and one that lists them."""
    known = yaml.safe_load((ROOT / "docs/methods.yml").read_text(encoding="utf-8"))
    papers = dict(ENTRY.findall((ROOT / "CITATIONS.bib").read_text(encoding="utf-8")))
    missing = sorted({*patch.METHODS} ^ {*known})
    if missing:
        raise ValueError(f"docs/methods.yml and the registry differ in {', '.join(missing)}")
    rows = []
    for name, words in known.items():
        write_text(folder / f"{name}.md", method_page(name, words, papers.get(name), name in pictured))
        rows.append({"name": name, "idea": words["idea"].split(". ")[0].rstrip(".") + "."})
    table = markdown({"method": "[`{name}`]({name}.md)", "idea": "{idea}"}, rows)
    costs = "What each method needs, costs and keeps is in [Which method?](../results/methods.md)."
    write_text(folder / "index.md", f"# Methods\n\n{table}\n\n{costs}\n")


def method_page(name: str, words: Mapping[str, str], paper: str | None, pictured: bool) -> str:
    """Idea, picture, options, when to take it, how to cite it."""
    entry = patch.find(name)
    rows = [
        {
            "option": option,
            "flag": flags_of(option, one),
            "default": default_of(one),
            "meaning": one_line(one.help, 900),
        }
        for option, one in entry.options.items()
    ]
    columns = {"option": "`{option}`", "flag": "`{flag}`", "default": "{default}", "meaning": "{meaning}"}
    parts = [f"# {name}", words["idea"]]
    parts += [f"![tokens that {name} leaves]({name}.png)"] if pictured else []
    parts += ["## When to take it", words["when"], "## Options", markdown(columns, rows)]
    parts += ["## Use", USE.format(name=name)]
    parts += ["## Cite", f"```bibtex\n@inproceedings{{{name},\n{paper}\n}}\n```"] if paper else []
    return "\n\n".join(parts) + "\n"


USE = """```
python segm/test.py runs/pure --patch-type {name}
```"""


def flags_of(name: str, option: patch.Option) -> str:
    """The flags of an option on a command line."""
    flag = option.flag or "--" + name.replace("_", "-")
    return flag if isinstance(flag, str) else ", ".join(flag)


def default_of(option: patch.Option) -> str:
    """A default in words."""
    if callable(option.default):
        return "depends on the model"
    return option.default_text if option.default is None else f"`{option.default}`"


@torch.inference_mode()
def draw_methods(run: Run, folder: Path) -> set[str]:
    """Pictures of what merges, on built-in scenes; the names of the methods that have one."""
    dataset = create_dataset("shapes", "val")
    drawn = set()
    for name, options in PICTURED.items():
        merged = run.with_settings(name, options)
        rows, captions = [], []
        for sample in (dataset[index] for index in range(N_SCENES)):
            view = merged.preprocess(sample.image)
            merged.model.grid_logits(view)
            reduction, grid = patch.reduction(merged.model), merged.model.grid(view.shape[-2:])
            given = sample.image, reduction.assignment[0].numpy(), grid, merged.model.patch_size
            rows.append([sample.image, outline_tokens(*given), fill_tokens(*given)])
            captions.append(["", "", f"{reduction.counts.item()} of {grid[0] * grid[1]} tokens"])
        write_picture(folder / f"{name}.png", picture_sheet(rows, ["image", "merged tokens", "filled"], captions))
        drawn.add(name)
    return drawn


if __name__ == "__main__":
    main()
