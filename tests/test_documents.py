"""What the documents say works: their Python runs, their command lines are understood, nothing is left out."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from string import Template
from textwrap import dedent

import build_docs
import click
import cv2
import numpy as np
import pytest
import timm
import torch
import yaml
from click.testing import CliRunner
from timm.models.vision_transformer import ResPostBlock

import patch
from g2tm.__main__ import LazyCommand, main
from patch.families import known as families
from patch.method import COMMON
from segm import merging, train
from tests.helpers import read_variant, write_variant

ROOT = Path(__file__).parents[1]
PAGES = ("docs", "docs/integrations", "results")
DOCUMENTS = {name: (ROOT / f"{name}.md").read_text() for name in ("README", "TRAINING", "RESULTS", "CONTRIBUTING")}
DOCUMENTS |= {f"{room}/{file.stem}": file.read_text() for room in PAGES for file in sorted((ROOT / room).glob("*.md"))}
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"(segm|scripts)/[\w/]+\.py|g2tm")


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """Methods and families that a document adds are gone afterwards."""
    methods = dict(patch.METHODS)
    monkeypatch.setattr(families, "FAMILIES", families.FAMILIES)
    yield
    patch.METHODS.clear()
    patch.METHODS.update(methods)


def run_python(document):
    """Run all Python of a document, top down; returns its names. A block that begins with a file's name is written
    there instead."""
    names = {}
    for _, language, code in FENCE.findall(DOCUMENTS[document]):
        file = re.match(r"# (\w+\.py)\n", code)
        if language == "python" and file:
            Path(file[1]).write_text(code)
        elif language == "python":
            exec(compile(dedent(code), f"{document}.md", "exec"), names)
    return names


def test_python_of_the_readme(shapes_run, tmp_path, monkeypatch):
    graph = tmp_path / "runs/graph"
    graph.parent.mkdir()
    shapes_run.rename(graph)
    variant = read_variant(graph)
    variant["dataset_kwargs"] |= {"patch_type": "graph", "selected_layer": 2, "threshold": 0.88}
    write_variant(variant, graph)
    cv2.imwrite(str(tmp_path / "photo.jpg"), np.zeros((40, 48, 3), dtype=np.uint8))
    monkeypatch.chdir(tmp_path)

    names = run_python("README")
    assert names["labels"].shape == (40, 48) and names["run"].options["threshold"] == 0.9
    assert names["features"].shape == (1, 197, 384)
    with torch.inference_mode():
        names["model"](torch.rand(2, 3, 224, 224))
    assert patch.reduction(names["model"]).lengths == (49, 49)
    assert merging.parse(["--patch-type", "runs", "--run-length", "4"]) == {"patch_type": "runs", "length": 4}


FORKS = """
import os, runpy, sys, timm, torch  # they take seconds, and know nothing of ours
for case in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        runpy.run_path(case, run_name="__main__") if case.endswith(".py") else exec(case, {})
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, case
"""


def python(folder, *cases):
    """Runs files or lines of Python, each in a process that has imported nothing of ours; returns what each prints.

    A copy of `patch` in the folder comes first.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    run = [sys.executable, "-c", FORKS, *cases]
    found = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    lines = found.stdout.splitlines()
    assert len(lines) == len(cases)
    return lines


@pytest.mark.nightly
def test_a_method_in_a_file_of_its_own(tmp_path):
    """The example of the README: as a script, as a module, and, without its use, in the folder of the methods."""
    (code,) = (code for _, _, code in FENCE.findall(DOCUMENTS["README"]) if "register(" in code)
    (tmp_path / "mine.py").write_text(f"{code}\nprint(patch.method(model), patch.options(model)['length'])\n")
    assert python(tmp_path, "mine.py", "import mine", "import patch; import mine") == ["runs 4"] * 3

    shutil.copytree(ROOT / "patch", tmp_path / "patch", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "patch/methods/runs.py").write_text(code[: code.index("\nmodel = ")])
    firsts = ("patch", "patch.method", "patch.methods.runs", "patch.learned")
    shown = "import patch; print(patch.__file__, *patch.METHODS)"
    for found in python(tmp_path, *(f"import {first}; {shown}" for first in firsts)):
        assert found.split() == [str(tmp_path / "patch/__init__.py"), *patch.METHODS, "runs"]


@pytest.mark.slow
def test_a_command_takes_the_file_of_a_method(tmp_path, shapes_run):
    """The example of the README as it stands, in a file that nothing but --plugin names."""
    (code,) = (code for _, _, code in FENCE.findall(DOCUMENTS["README"]) if "register(" in code)
    (tmp_path / "mine.py").write_text(code)
    words = ["--plugin", "mine.py", "--patch-type", "runs", "--run-length", "4", "--max-images", "1", "--device", "cpu"]
    run = [sys.executable, str(ROOT / "segm/test.py"), str(shapes_run), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.returncode == 0 and "mean_iou" in found.stdout, found.stderr


@pytest.mark.slow
def test_a_package_registers_methods(tmp_path):
    """By an entry point; a broken one is said, and harms nothing."""
    (code,) = (code for _, _, code in FENCE.findall(DOCUMENTS["README"]) if "register(" in code)
    (tmp_path / "mine.py").write_text(code[: code.index("\nmodel = ")])
    for name, module in (("good", "mine"), ("broken", "nosuch")):
        folder = tmp_path / f"{name}-1.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1\n")
        (folder / "entry_points.txt").write_text(f"[g2tm.methods]\n{name} = {module}\n")
    line = "import warnings\nwith warnings.catch_warnings(record=True) as seen:\n import {}\nimport patch\n"
    line += "print('runs' in patch.METHODS, *(str(one.message) for one in seen))"
    said = "True broken = nosuch registers no method: No module named 'nosuch'"
    assert python(tmp_path, line.format("patch"), line.format("mine")) == [said] * 2


@torch.inference_mode()
def test_python_of_the_contributing_guide():
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 10, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", block_fn=ResPostBlock, **size).eval()
    images = torch.randn(2, 3, 32, 32)
    plain = model.forward_features(images)
    run_python("CONTRIBUTING")

    patch.apply(model, "share", rest=1)
    torch.testing.assert_close(model.forward_features(images), plain, atol=1e-5, rtol=1e-5)
    patch.remove(model)
    patch.apply(model, "share", **merging.choose(merging.parse(["--patch-type", "share", "--rest", "0.5"]))[1])
    model.forward_features(images)
    assert patch.reduction(model).lengths == (2, 2)  # of 16, halved three times


@torch.inference_mode()
def test_python_of_the_site():
    names = run_python("docs/concepts")
    assert names["reduction"].assignment.shape == (1, 196)
    with torch.inference_mode(False):
        assert run_python("docs/hooks")["maps"].shape == (2, 192, 14, 14)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder of its own, from which Python imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)


def halves(model):
    """Whether its last pass left half of 64 tokens of every image."""
    return {*patch.reduction(model).lengths} == {32}


@torch.inference_mode()
def test_python_of_the_page_on_smp(in_folder):
    pytest.importorskip("segmentation_models_pytorch")
    names = run_python("docs/integrations/smp")
    model, images, merged = (names[name] for name in ("model", "images", "logits"))
    assert patch.reduction(model).lengths == (98, 98)
    patch.remove(model)
    model.load_state_dict(names["weights"])
    plain = model(images)
    assert merged.shape == plain.shape and 0 < (merged - plain).std() < plain.std()
    patch.apply(model, "graph", layers=[2], threshold=1.0)
    torch.testing.assert_close(model(images), plain, atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_python_of_the_page_on_transformers(in_folder):
    pytest.importorskip("transformers")
    with torch.inference_mode(False):
        names = run_python("docs/integrations/transformers")
    assert names["depth"].shape == (48, 64) and all(part["mask"].size == (64, 48) for part in names["masks"])
    assert sum(np.array(part["mask"]) > 0 for part in names["segments"]).min() == 1  # every pixel has a class
    model, images = names["model"], torch.rand(2, 3, 64, 64)
    merged = model(images).masks_queries_logits
    assert halves(model)
    plain = patch.remove(model)(images).masks_queries_logits
    assert merged.shape == plain.shape and not torch.allclose(merged, plain, atol=1e-3)


def test_python_of_the_page_on_mmsegmentation(in_folder):
    from segm.data import openmmlab  # noqa: F401 -- keeps the import quiet

    names = run_python("docs/integrations/mmsegmentation")
    model, labels = names["model"], names["labels"]
    assert type(model).__name__ == "MergedEncoderDecoder" and halves(model) and labels.shape == (1, 48, 64)
    plain = patch.remove(model)
    photo = names["np"].random.default_rng(0).integers(0, 255, (48, 64, 3), dtype="uint8")
    before = names["inference_model"](plain, photo).seg_logits.data
    patch.apply(plain, "keymatch", tokens=0.5)
    merged = names["inference_model"](plain, photo).seg_logits.data
    assert merged.shape == before.shape and not torch.equal(merged, before)


@pytest.mark.slow  # Lightning takes seconds to import
def test_python_of_the_page_on_training(in_folder):
    pytest.importorskip("accelerate")
    pytest.importorskip("lightning")
    names = run_python("docs/integrations/training")
    assert all(p.grad is not None for p in names["objective"].parameters())
    task, vit = names["task"], names["prepared"]
    assert halves(task) and halves(vit) and all(p.grad is not None for p in vit.parameters())
    state = names["accelerator"].unwrap_model(vit).state_dict()
    timm.create_model("vit_tiny_patch16_224", **names["small"]).load_state_dict(state)


def test_python_of_the_page_on_lora(in_folder):
    pytest.importorskip("peft")
    names = run_python("docs/integrations/lora")
    assert names["same"] and names["close"] and halves(names["merged"]) and patch.is_patched(names["merged"])


def test_cells_of_the_notebook_that_trains_nothing():
    cells = json.loads((ROOT / "docs/notebooks/merge_a_vit.ipynb").read_text())["cells"]
    names = {}
    for cell in cells:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)
    assert names["same"] and names["reduction"].assignment.shape == (2, 196)


def test_every_method_has_a_page_and_a_citation():
    known = yaml.safe_load((ROOT / "docs/methods.yml").read_text())
    assert known.keys() == patch.METHODS.keys() and all(one.keys() == {"idea", "when"} for one in known.values())
    site = (ROOT / "mkdocs.yml").read_text()
    assert all(f"methods/{name}.md" in site for name in known)
    cited = re.findall(r"^@\w+\{(\w+),", (ROOT / "CITATIONS.bib").read_text(), re.MULTILINE)
    assert {*cited} == {*patch.METHODS, "segmenter"} - {"keymatch", "random"}


def test_links_of_the_site_lead_to_its_files(tmp_path):
    """`make docs` checks the same, but also executes the notebooks, which takes minutes."""
    build_docs.write_documents(tmp_path / "site")
    build_docs.write_methods(tmp_path / "site/methods", set())
    broken = []
    for file in (tmp_path / "site").rglob("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]*)?\)", file.read_text()):
            if not (re.match(r"\w+:", target) or (file.parent / target).exists()):
                broken.append(f"{file.relative_to(tmp_path)}: {target}")
    assert not broken


@pytest.mark.parametrize("name", patch.METHODS)
def test_the_python_of_every_method_page_runs(name):
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 12, "num_heads": 2}
    names = {"patch": patch, "model": timm.create_model("vit_tiny_patch16_224", **size).eval()}
    exec(build_docs.python_of(patch.find(name)), names)
    assert patch.method(names["model"]) == name
    page = build_docs.method_page(name, {"idea": "", "when": ""}, None, build_docs.measured(name), False)
    assert build_docs.python_of(patch.find(name)) in page


def test_the_index_of_methods_compares_them(tmp_path):
    build_docs.write_methods(tmp_path, set())
    index = (tmp_path / "index.md").read_text()
    for name in patch.METHODS:
        (row,) = (line for line in index.splitlines() if line.startswith(f"| [`{name}`]({name}.md) |"))
        _, what, tokens, speedup, lost, paper = row.strip("| ").split(" | ")
        assert what and (tokens == speedup == lost == "–" or (float(speedup) > 0.5 and float(lost) > -1))
        assert paper == "ours" or "arxiv.org" in paper or re.search(r"20\d\d$", paper)


def command_lines(text):
    """Every command line of a document that starts a program of ours, as words; variables are filled in."""
    blocks = [code for _, language, code in FENCE.findall(text) if not language]
    inline = re.findall(r"`((?:python|torchrun|g2tm)\s[^`]+)`", FENCE.sub("", text))
    variables = {"DATASET": "data"}
    for line in "\n".join([*blocks, *(" ".join(code.split()) for code in inline)]).replace("\\\n", " ").splitlines():
        words = shlex.split(Template(line).safe_substitute(variables), comments=True)
        if len(words) == 1 and "=" in words[0]:
            name, _, value = words[0].partition("=")
            variables[name] = value
        if words[:1] != ["git"] and any(PROGRAM.fullmatch(word) for word in words):
            yield words


@pytest.fixture
def load(monkeypatch):
    """The click command in a file of ours."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))

    def find(file):
        name = file.removesuffix(".py").removeprefix("scripts/").replace("/", ".")
        return importlib.import_module(name).main

    yield find
    for name in set(sys.modules) - before:
        if str(ROOT / "scripts") in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


def check_command(command, words):
    """Raises unless a command takes these words, and its methods the options among them."""
    for word in words:
        if re.match(r"(runs|imagenet)/\w+$", word):
            Path(word).mkdir(parents=True, exist_ok=True)
    context = command.make_context("command", list(words))
    chosen = context.params.get("merging") or {}
    if "patch_type" in chosen and chosen.get("threshold") != "auto":
        merging.choose(chosen)
    for option, word in pairwise(words):
        if option == "--train-options":
            train.main.make_context("train", ["--log-dir", "runs/new", *shlex.split(word)])
            words = [other for other in words if other != word]
    for part in (part for word in words if " --" in word for part in word.split(",")):  # methods to compare
        merging.parse(shlex.split(part)[1:])


def file_below_g2tm(words):
    """The file of the command that the words after `g2tm` start, and the arguments among them."""
    command = main
    while not isinstance(command, LazyCommand):
        if words[0] == "--help":
            return "g2tm/__main__.py", []
        command, words = command.commands[words[0]], words[1:]
    return f"{command.where.replace('.', '/')}.py", words


def test_commands_are_understood(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = set()
    for name, text in DOCUMENTS.items():
        for words in command_lines(text):
            place = next(i for i, word in enumerate(words) if PROGRAM.fullmatch(word))
            file, arguments = words[place], words[place + 1 :]
            if file == "g2tm":
                file, arguments = file_below_g2tm(arguments)
            seen.add(file)
            assert (ROOT / file).is_file(), f"{name}: no {file}"
            if not arguments or not hasattr(load(file), "make_context"):
                continue
            try:
                check_command(load(file), arguments)
            except Exception as error:
                pytest.fail(f"{name}: {shlex.join(words)}: {error}")
    files = [file for file in (ROOT / "segm").rglob("*.py") if "@click.command" in file.read_text()]
    assert {str(file.relative_to(ROOT)) for file in files} <= seen


def test_methods_and_options_are_named():
    for name, method in {"pure": None, **patch.METHODS}.items():
        row = re.search(rf"^\| `{name}` \|.*$", DOCUMENTS["README"], re.MULTILINE)
        assert row, name
        own = set(method.options) - set(COMMON) if method else ()
        assert all(f"`{option}`" in row[0] for option in own), (name, own)
    command = merging.MergingCommand(None, add_help_option=False)
    for parameter in command.get_params(click.Context(command)):
        assert any(re.search(rf"`{flag}[ `]", DOCUMENTS["TRAINING"]) for flag in parameter.opts), parameter.opts


def test_tables_are_narrow_and_links_lead_somewhere():
    for name, text in DOCUMENTS.items():
        prose = FENCE.sub("", text)
        for line in prose.splitlines():
            if line.lstrip().startswith("|"):
                assert re.sub(r"`[^`]*`", "", line).count("|") <= 7, (name, line)
        for link in re.findall(r"\]\((?!https?://)([^)#]+)", prose):
            if not name.startswith("docs/"):  # whose links are those of the site
                assert (ROOT / name).parent.joinpath(link).exists(), (name, link)


def anchors(text):
    """Where links into a document can lead, as GitHub names its headings."""
    titles = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.replace("`", "")).strip().lower().replace(" ", "-") for title in titles}


def test_links_into_a_document_lead_to_a_heading():
    for name, text in DOCUMENTS.items():
        for link, anchor in re.findall(r"\]\((?!https?://)([^)#]*)#([^)]+)\)", FENCE.sub("", text)):
            file = (ROOT / name).parent.joinpath(link) if link else ROOT / f"{name}.md"
            assert name.startswith("docs/") or anchor in anchors(file.read_text()), (name, link, anchor)


def test_files_to_read_first_exist():
    (order,) = re.findall(r"^Read in this order:(.*?)\n\n", DOCUMENTS["README"], re.MULTILINE | re.DOTALL)
    files = re.findall(r"`([\w/]+\.py)`", order)
    assert len(files) == 6 and all((ROOT / file).is_file() for file in files)


def test_documents_are_short():
    assert len(DOCUMENTS["README"].splitlines()) <= 200 and len(DOCUMENTS["RESULTS"].splitlines()) <= 250
    assert len([*(ROOT / "results").rglob("*.json")]) <= 12


def test_every_picture_of_results_is_shown():
    shown = {path.rsplit("/", 1)[-1] for text in DOCUMENTS.values() for path in re.findall(r"\]\(([^)]+\.png)\)", text)}
    assert shown == {file.name for file in (ROOT / "results").rglob("*.png")}


# ---------------------------------------------------------------------------------------------- tables of results


@pytest.fixture
def tables(monkeypatch):
    """The script that makes the tables."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    yield importlib.import_module("tables")
    for name in ("tables", "results_file"):
        sys.modules.pop(name, None)


def test_tables_of_the_documents_are_those_of_the_files_of_results(tables):
    named = set()
    for name, text in DOCUMENTS.items():
        assert tables.filled(text) == text, f"{name}: run python scripts/tables.py"
        named |= {found[2] for found in tables.MARKED.finditer(text)}
    assert named == {*tables.TABLES}  # and every table is in a document
    assert {str(file.relative_to(ROOT)) for file in tables.DOCUMENTS} >= {"README.md", "RESULTS.md", "results/time.md"}


def test_a_changed_figure_is_found(tables, tmp_path, monkeypatch):
    text = "<!-- table: machines -->\n| M1 | another |\n<!-- end -->\n"
    assert tables.filled(text) != text and tables.filled(tables.filled(text)) == tables.filled(text)
    file = tmp_path / "RESULTS.md"
    file.write_text(text)
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    monkeypatch.setattr(tables, "DOCUMENTS", [file])
    check = ["--check"]
    assert CliRunner().invoke(tables.main, check).exit_code == 1 and file.read_text() == text
    assert CliRunner().invoke(tables.main, []).exit_code == 0 and file.read_text() == tables.filled(text)
    assert CliRunner().invoke(tables.main, check).exit_code == 0
    with pytest.raises(ValueError, match="no table nothing: choose from time, "):
        tables.filled("<!-- table: nothing -->\n<!-- end -->\n")


def test_questions_have_one_short_table(tables):
    _, _, _, _, *questions = DOCUMENTS["RESULTS"].split("\n## ")  # the title, what was not measured, machines, words
    assert len(questions) == 6
    for section in questions:
        lines = [line for line in section.splitlines() if line.startswith("| ")]
        assert section.count("<!-- table: ") == 1 and 6 <= len(lines[2:]) <= 10, section


def test_entries_name_their_machine_and_command(tables):
    machines = {one["machine"] for one in tables.known_machines()}
    for file in (ROOT / "results").glob("*.json"):
        if file.stem != tables.MACHINES:
            entries = json.loads(file.read_text())
            assert len({entry["id"] for entry in entries}) == len(entries)
            for entry in entries:
                assert entry["machine"] in machines and entry["command"].startswith("scripts/") and entry["rows"], (
                    entry["id"]
                )
                assert {"device", "threads", "python", "torch", "timm", "date"} <= entry.keys()


def test_speed_at_equal_quality_by_hand(tables):
    """Plain models take 0.1 s for 60 and 0.3 s for 70 mIoU; halfway between them, 0.2 s."""
    plain = [{"mean_iou": 60.0, "images_per_second": 10.0}, {"mean_iou": 70.0, "images_per_second": 10 / 3}]
    cases = {(65.0, 10.0): "2.00", (60.0, 10.0): "1.00", (59.0, 20.0): "-", (71.0, 5.0): "> 1.50"}
    for (score, speed), expected in cases.items():
        assert tables.times_as_fast({"mean_iou": score, "images_per_second": speed}, plain) == expected
