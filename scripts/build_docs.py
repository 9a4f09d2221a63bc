"""Assembles the documentation site behind `make docs`: the documents of the repository, a page per method, notebooks.

mkdocs then builds it, executes the notebooks and checks all links.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
import yaml
from results_file import read

import patch
from patch.budget import KNOBS
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
CITATIONS = "CITATIONS.bib"
OWN = [file.relative_to(ROOT / "docs").as_posix() for file in (ROOT / "docs").rglob("*.*")]
LINKS = PAGES | {"LICENSE": "licenses.md"} | {f"docs/{name}": name for name in OWN}
ENTRY = re.compile(r"@\w+\{(\w+),\n(.*?)\n\}", re.DOTALL)
N_SCENES = 3
SIDE, SHARE = 336, 0.6  # of the numbers on the pages of methods: shorter side, pixels, and tokens that are left
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
    write_documents(out)
    pictured = draw_methods(Run.load(run_path, patch_type=PURE), out / "methods") if run_path is not None else set()
    write_methods(out / "methods", pictured)
    command = [sys.executable, "-m", "mkdocs", "build"]
    if subprocess.run(command, cwd=ROOT).returncode:
        raise ValueError("mkdocs found faults, see above")


def write_documents(out: Path) -> None:
    """The documents of the repository, with their pictures and notebooks."""
    shutil.copytree(ROOT / "docs", out, ignore=shutil.ignore_patterns("*.yml"))
    shutil.copy(ROOT / CITATIONS, out)
    for name, page in PAGES.items():
        write_text(out / page, linked((ROOT / name).read_text(encoding="utf-8")))
    for picture in (ROOT / "results").rglob("*.png"):
        target = out / picture.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(picture, target)


def linked(text: str) -> str:
    """A document with links to the pages of the site in place of those to files of the repository."""
    for name, page in LINKS.items():
        text = re.sub(rf"\]\((\.\./)?{re.escape(name)}(#[\w-]+)?\)", rf"](\g<1>{page}\2)", text)
    return text


def write_methods(folder: Path, pictured: set[str]) -> None:
    """A page per method, and one that lists them."""
    known = yaml.safe_load((ROOT / "docs/methods.yml").read_text(encoding="utf-8"))
    papers = dict(ENTRY.findall((ROOT / CITATIONS).read_text(encoding="utf-8")))
    missing = sorted({*patch.METHODS} ^ {*known})
    if missing:
        raise ValueError(f"docs/methods.yml and the registry differ in {', '.join(missing)}")
    rows = []
    for name, words in known.items():
        paper, cost = papers.get(name), measured(name)
        write_text(folder / f"{name}.md", method_page(name, words, paper, cost, name in pictured))
        shown = {"name": name, "what": patch.find(name).summary, "paper": link_of(paper)}
        cells = {"tokens": "–", "speedup": "–", "lost": "–"} if cost is None else cost.cells
        rows.append(shown | cells)
    columns = {
        "method": "[`{name}`]({name}.md)",
        "what it does": "{what}",
        "tokens left": "{tokens}",
        "speed-up": "{speedup}",
        "mIoU lost": "{lost}",
        "paper": "{paper}",
    }
    table = markdown(columns, rows)
    write_text(folder / "index.md", f"# Methods\n\n{INDEX}\n\n{table}\n")


INDEX = """Take [`keymatch`](keymatch.md) first: `patch.apply(model, tokens=0.6)`. Where you have a trained Segmenter,
[`segm/tune.py`](../training.md#tune) compares it with others on your images.

The numbers are those of DINOv2 ViT-S/14 on CamVid at 448 × 336, merging applied without training, at about 60 % of the
tokens, on a CPU with two threads: label maps per second over those without merging in the same run, and the points of
mIoU that it costs. –: not measured there, for instance because it has to be trained first. More in
[Which method?](../results/methods.md)."""


class Cost(NamedTuple):
    """The effect of a method on a trained model, in one run: tokens left of the patches, label maps/s and mIoU without
    merging and with it."""

    tokens: float
    n_patches: int
    speeds: tuple[float, float]
    scores: tuple[float, float]

    @property
    def cells(self) -> dict[str, str]:
        """As tables show it."""
        speedup, lost = self.speeds[1] / self.speeds[0], self.scores[0] - self.scores[1]
        return {"tokens": f"{self.tokens:.0f} of {self.n_patches}", "speedup": f"{speedup:.2f}", "lost": f"{lost:.1f}"}


def measured(name: str) -> Cost | None:
    """The cost of a method on the model of the results, at about 60 % of the tokens; None: it was not measured."""
    for question, run, im_size in (("methods", "methods-2", None), ("size", "frontier-2", SIDE)):
        (entry,) = (entry for entry in read(question) if entry["id"] == run)
        rows = [row for row in entry["rows"] if row["im_size"] == im_size and not row.get("patch_size")]
        (pure,) = (row for row in rows if row["method"] == PURE)
        own = [row for row in rows if row["method"] == name]
        if own:
            row = min(own, key=lambda row: abs(row["tokens"] - SHARE * pure["tokens"]))
            pairs = [(pure[key], row[key]) for key in ("images_per_second", "mean_iou")]
            return Cost(row["tokens"], round(pure["tokens"]), *pairs)
    return None


def link_of(paper: str | None) -> str:
    """The paper's link, or where it has none its place, from its entry in CITATIONS.bib; ours: there is none."""
    if paper is None:
        return "ours"
    if found := re.search(r"eprint = \{([\d.]+)\}", paper):
        return f"[{found[1]}](https://arxiv.org/abs/{found[1]})"
    return " ".join(re.findall(r"(?:booktitle|journal|year) = \{(\w+)\}", paper))


def method_page(name: str, words: Mapping[str, str], paper: str | None, cost: Cost | None, pictured: bool) -> str:
    """Idea, picture, when to take it, its cost, options, how to use and cite it."""
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
    parts = [f"# {name}", f"{words['idea']} Paper: {link_of(paper)}." if paper else words["idea"]]
    parts += [f"![tokens that {name} leaves]({name}.png)"] if pictured else []
    parts += ["## When to take it", words["when"]]
    parts += [MEASURED.format(**cost.cells)] if cost is not None else []
    parts += ["## Use", USE.format(name=name, python=python_of(entry)), "## Options", markdown(columns, rows)]
    parts += ["## Cite", f"```bibtex\n@inproceedings{{{name},\n{paper}\n}}\n```"] if paper else []
    return "\n\n".join(parts) + "\n"


MEASURED = (
    "DINOv2 ViT-S/14 on CamVid, without training: {tokens} tokens left, {speedup} times as many label maps per second "
    "on a CPU, {lost} points of mIoU lost ([more](../results/methods.md))."
)
USE = """```python
{python}
```

```
python segm/test.py runs/pure --patch-type {name}
```"""


def python_of(entry: patch.Method) -> str:
    """A line of Python that applies a method to a model, with the option that says how much merges."""
    added = f'patch.add_modules(model, "{entry.name}")  # its learned parts, which have to be trained\n'
    knob = next((name for name in KNOBS if name in entry.options and entry.options[name].default is not None), None)
    given = "" if knob is None else f", {knob}={entry.options[knob].default}"
    return (added if entry.uses_learned({}) else "") + f'patch.apply(model, "{entry.name}"{given})'


def flags_of(name: str, option: patch.Option) -> str:
    """The flags of an option on a command line."""
    flag = option.flag or "--" + name.replace("_", "-")
    return flag if isinstance(flag, str) else ", ".join(flag)


def default_of(option: patch.Option) -> str:
    """A default in words."""
    if callable(option.default):
        return "depends on the model"
    if isinstance(option.default, tuple):
        return f"`{' '.join(map(str, option.default))}`"
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
