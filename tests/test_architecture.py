"""The arrows of the house: who may import whom."""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
OURS = ("segm", "g2tm", "patch", "vis")
SOURCES = sorted(file for folder in OURS for file in (ROOT / folder).rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def imports(file):
    """Modules that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def rooms_used(file):
    return {name.split(".")[0] for name in imports(file)} & set(OURS)


def is_command(file):
    return "@click.command" in file.read_text()


# What commands are built on may know methods too; others take measures of `patch`, or the words of its exporter.
KNOW_METHODS = {"merging.py", "resolve.py", "run.py", "trainer.py", "search.py", "eval/cost.py", "eval/timing.py"}
KNOW_METHODS |= {"exporting.py"}


ENTRANCE = ROOT / "g2tm/__main__.py"  # the command `g2tm`, which starts the commands of segm by their names


def test_imports_run_one_way():
    allowed = {"g2tm": {"g2tm"}, "patch": {"patch", "g2tm"}, "vis": {"vis"}, "segm": {"segm", "patch", "vis"}}
    for file in SOURCES:
        room = file.relative_to(ROOT).parts[0]
        if file != ENTRANCE:
            assert rooms_used(file) <= allowed[room], file


def test_of_segm_only_commands_and_what_they_are_built_on_know_methods():
    others = [file for file in SOURCES if ROOT / "segm" in file.parents and not is_command(file)]
    assert {str(file.relative_to(ROOT / "segm")) for file in others if "patch" in rooms_used(file)} == KNOW_METHODS
    assert not [file for file in others if "vis" in rooms_used(file)]


def test_only_readers_of_data_and_heads_import_mmseg():
    for file in SOURCES:
        if any(name.split(".")[0] in ("mmseg", "mmcv", "mmengine") for name in imports(file)):
            assert ROOT / "segm/data" in file.parents or file.name == "openmmlab_heads.py", file


@cache
def distributions_of_packages():
    """Looks at every file that is installed."""
    return packages_distributions()


def test_commands_read_their_help_without_what_is_slow_to_import():
    """PyTorch aside, with which the methods, and so their options, are written."""
    commands = [file for file in sorted((ROOT / "segm").rglob("*.py")) if "@click.command" in file.read_text()]
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in commands]
    assert {"segm.train", "segm.speedtest", "segm.eval.miou"} <= set(modules)
    slow = ["mmseg", "mmengine", "timm", "torchvision", "torch._dynamo", "sympy", "transformers"]
    slow += ["onnxruntime", "openvino"]
    code = f"import sys, {', '.join(modules)}; print([name for name in {slow} if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_segm_shadows_no_module():
    """`python segm/train.py` puts segm first on the path."""
    modules = (file for file in (ROOT / "segm").iterdir() if file.suffix in (".py", "") and file.name[0] != "_")
    names = {file.stem for file in modules} - {"test"}
    assert not names & (set(sys.stdlib_module_names) | set(distributions_of_packages()))


def test_libraries_do_not_print():
    for file in SOURCES:
        calls = (node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call))
        assert not any(isinstance(call.func, ast.Name) and call.func.id == "print" for call in calls), file


def test_every_package_is_installed_with_its_types():
    setup = PROJECT["tool"]["setuptools"]
    folders = {".".join(file.relative_to(ROOT).parts[:-1]) for file in SOURCES}
    packages = {name.removeprefix("g2tm.") for name in setup["packages"]}
    assert folders == {name for name in packages if not name.startswith(("configs", "vis.assets"))}
    assert all((ROOT / name / "py.typed").exists() for name in OURS)  # setuptools takes them along


def test_the_license_of_every_dependency_is_listed():
    project = PROJECT["project"]
    wanted = [
        *project["dependencies"],
        *(name for extra in project["optional-dependencies"].values() for name in extra),
    ]
    listed = (ROOT / "docs/licenses.md").read_text()
    for text in wanted:
        name = re.match(r"[\w.-]+", text)[0]
        assert name == "g2tm" or re.search(rf"[ ,|]{re.escape(name)}[ ,]", listed), name


def test_every_dependency_is_imported():
    """What other packages bring along is left to them; torch writes its events with tensorboard, and exports with
    onnxscript."""
    scripts = (ROOT / "scripts").glob("*.py")
    used = {name.split(".")[0] for file in (*SOURCES, *scripts) for name in imports(file)}
    used |= {"tensorboard", "onnxscript"}
    distributions = {one.lower() for name in used for one in distributions_of_packages().get(name, ())}
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"]]
    wanted += [one for name in ("train", "onnx", "openvino", "transformers") for one in extras[name]]
    declared = {re.match(r"[\w.-]+", text)[0].lower() for text in wanted if not text.startswith("g2tm[")}
    assert declared <= distributions
