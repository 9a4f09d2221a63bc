"""What an installation without extras does, and where it refuses."""

import ast
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import click
import cv2
import numpy as np
import pytest
import release
from click.testing import CliRunner

ROOT = Path(__file__).parents[1]
ROOMS = {"patch", "segm", "vis"}  # imported by these names in the checkout, and below g2tm elsewhere
EXTRAS = ("mmseg", "mmcv", "mmengine", "tensorboard", "torch.utils.tensorboard", "onnx", "onnxruntime", "onnxscript")
WITHOUT_EXTRAS = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({(*EXTRAS, "transformers")}))  # importing them fails
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without_extras(*words):
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_without_extras_a_photograph_gets_its_labels(shapes_run, tmp_path):
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/a.png"), np.zeros((40, 50, 3), np.uint8))
    merging = ["--patch-type", "graph", "--threshold", "0.5", "--device", "cpu"]
    words = ["segm/inference.py", shapes_run, "-i", tmp_path / "photos", "-o", tmp_path / "out", *merging]
    result = run_without_extras(*words)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out/a.png").exists()


@pytest.mark.nightly
def test_without_extras_a_plain_vit_is_patched(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import timm, torch, patch\n"
        "model = timm.create_model('vit_tiny_patch16_224', depth=3).eval()\n"
        "patch.apply(model, 'graph', threshold=-1.0)\n"
        "assert model.forward_features(torch.rand(1, 3, 224, 224)).shape == (1, 197, 192)\n"
        "assert patch.reduction(model).counts.tolist() == [1]\n"
    )
    result = run_without_extras(script)
    assert result.returncode == 0, result.stderr


@pytest.mark.nightly
def test_what_needs_an_extra_names_it(shapes_run, tmp_path, folder_data, monkeypatch):
    monkeypatch.setenv("DATASET", str(folder_data))
    net = ["--backbone", "vit_tiny_patch16_384", "--no-pretrained", "--device", "cpu", "--dataset"]
    for words in (
        ["segm/train.py", "--log-dir", tmp_path / "new", *net, "shapes"],
        ["segm/train.py", "--log-dir", tmp_path / "new", *net, "folder"],
        ["segm/export_onnx.py", shapes_run],
    ):
        result = run_without_extras(*words)
        assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr
        assert "pip install 'g2tm[" in result.stderr, result.stderr


@pytest.fixture(scope="session")
def our_setup():
    """The names in setup.py."""
    pytest.importorskip("setuptools", minversion="77")
    return runpy.run_path(str(ROOT / "setup.py"))


def test_another_project_is_not_imported_in_place_of_the_checkout(our_setup, tmp_path, monkeypatch):
    """An editable install has the bare names. That a wheel lives beside the other project: below."""
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    from setuptools.dist import Distribution

    project = Distribution({"packages": ["g2tm", "g2tm.patch", "g2tm.patch.methods", "g2tm.configs"]})
    our_setup["Editable"](project).ensure_finalized()
    assert project.packages == ["g2tm", "patch", "patch.methods"]
    (tmp_path / "patch.py").touch()
    with pytest.raises(SystemExit, match="another project with the import name of ours"):
        our_setup["Editable"](project).ensure_finalized()


@pytest.fixture(scope="session")
def built(our_setup, tmp_path_factory):
    """Source archive and wheel of what git tracks."""
    try:
        release.git("ls-files")
    except click.ClickException:
        pytest.skip("no git here")
    return release.build(tmp_path_factory.mktemp("dist"))


@pytest.mark.slow
def test_archive_and_wheel_hold_what_they_should(built, tmp_path):
    archive, wheel = built
    tracked = release.git("ls-files")
    assert release.wrong_in_archive(archive, tracked) == release.wrong_in_wheel(wheel, tracked) == []
    assert release.wrong_in_archive(archive, [*tracked, "segm/new.py"]) == [f"{archive.name} lacks segm/new.py"]
    changed = tmp_path / wheel.name
    shutil.copy(wheel, changed)
    with zipfile.ZipFile(changed, "a") as files:
        files.writestr("g2tm/tests/data.npz", "")
    lacks, holds = release.wrong_in_wheel(changed, [*tracked, "vis/new.py", "results/new.json"])
    assert lacks.endswith("lacks g2tm/vis/new.py") and "holds g2tm/tests/data.npz" in holds


@pytest.mark.slow
def test_the_wheel_imports_g2tm_alone(built):
    with zipfile.ZipFile(built[1]) as files:
        (names,) = (files.read(name) for name in files.namelist() if name.endswith("/top_level.txt"))
        assert names == b"g2tm\n"
        for name in files.namelist():
            if name.endswith(".py"):
                assert not ROOMS & {one.split(".")[0] for one in imports(ast.parse(files.read(name)))}, name


def test_what_is_not_committed_is_not_released(tmp_path, monkeypatch):
    monkeypatch.setattr(release, "git", lambda *words: [" M setup.py"])
    result = CliRunner().invoke(release.main, ["--out", str(tmp_path / "dist")])
    assert result.exit_code == 1 and "such as  M setup.py;" in result.stderr and not (tmp_path / "dist").exists()
    monkeypatch.setattr(release, "git", lambda *words: [])
    (tmp_path / "old.whl").touch()
    result = CliRunner().invoke(release.main, ["--out", str(tmp_path)])
    assert result.exit_code == 1 and "is not empty" in result.stderr and [*tmp_path.iterdir()] == [tmp_path / "old.whl"]


def imports(tree):
    """Modules that are imported anywhere in a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module


def test_imports_move_and_all_else_stays(our_setup):
    text = """\"\"\"Länge: import patch\"\"\"
import patch  # import patch
import os, patch.methods, vis as v
if x: import segm.run as run; from segm.run import (  # patch
    Run,  # segm
)
from patch import visible, vis
from . import patch
import patches, g2tm
from visible import vis
name = "ö"; from vis import a; b = "from vis import a"
"""
    expected = """\"\"\"Länge: import patch\"\"\"
import g2tm.patch as patch  # import patch
import os, g2tm.patch.methods, g2tm.patch as patch, g2tm.vis as v
if x: import g2tm.segm.run as run; from g2tm.segm.run import (  # patch
    Run,  # segm
)
from g2tm.patch import visible, vis
from . import patch
import patches, g2tm
from visible import vis
name = "ö"; from g2tm.vis import a; b = "from vis import a"
"""
    assert our_setup["below_g2tm"](text.encode()).decode() == expected
    windows = text.replace("\n", "\r\n").encode()
    assert our_setup["below_g2tm"](windows).decode() == expected.replace("\n", "\r\n")


def test_an_earlier_build_leaves_nothing(our_setup, tmp_path, monkeypatch):
    from setuptools.dist import Distribution

    monkeypatch.chdir(tmp_path)
    for file, text in (("g2tm/__init__.py", ""), ("patch/__init__.py", "import vis\n"), ("lib/patch/old.py", "")):
        Path(file).parent.mkdir(parents=True)
        Path(file).write_text(text)
    rooms = {"packages": ["g2tm", "g2tm.patch"], "package_dir": {"g2tm.patch": "patch"}}
    command = our_setup["Build"](Distribution(rooms | {"script_name": "setup.py"}))
    command.build_lib = "lib"
    command.ensure_finalized()
    command.run()
    assert {str(file) for file in Path("lib").rglob("*.py")} == {"lib/g2tm/__init__.py", "lib/g2tm/patch/__init__.py"}
    assert Path("lib/g2tm/patch/__init__.py").read_text() == "import g2tm.vis as vis\n"


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory):
    """Starts programs of a new environment that has the wheel, the dependencies and another project named `patch`."""
    pytest.importorskip("pip")
    folder = tmp_path_factory.mktemp("new")
    venv.create(folder / "venv")
    python = venv.EnvBuilder().ensure_directories(folder / "venv").env_exe
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*pip, str(built[1])], check=True)
    where = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
    site = Path(subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip())
    # Folders that a .pth names are searched; their own .pth files, that of an editable install, are not read.
    others = [one for one in sys.path if Path(one).name in ("site-packages", "dist-packages")]
    (site / "others.pth").write_text("\n".join(others))
    (site / "patch.py").write_text("fromfile = None  # another project\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(program, *words, cwd=folder):
        command = [Path(python).with_name(program), *map(str, words)]
        result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    return run


USE = """
import pickle, sys, timm, torch
from concurrent.futures import ThreadPoolExecutor
import patch as other
from g2tm import patch
from g2tm.segm.config import load_config
assert other.fromfile is None and load_config("datasets") and load_config("recipes/ade20k_512_tiny_graph")
model = timm.create_model("vit_tiny_patch16_224", depth=3).eval()
patch.apply(model, "graph", threshold=-1.0)
copy = pickle.loads(pickle.dumps(model))
image = torch.rand(1, 3, 224, 224)
with torch.no_grad(), ThreadPoolExecutor(2) as pool:
    one, two = pool.map(lambda it: it.forward_features(image), (model, copy))
    assert torch.equal(one, two)
    copy.forward_features(image)
assert patch.reduction(copy).lengths == (1,)
assert not {"segm", "vis"} & {*sys.modules} and "site-packages" in patch.__file__, patch
print("used")
"""


@pytest.mark.slow
def test_the_wheel_works_beside_another_project_named_patch(installed, shapes_run, tmp_path):
    assert installed("python", "-c", USE) == "used\n"
    (tmp_path / "photos").mkdir()
    cv2.imwrite(str(tmp_path / "photos/a.png"), np.zeros((40, 50, 3), np.uint8))
    words = ["-i", tmp_path / "photos", "-o", tmp_path / "out", "--patch-type", "graph", "--device", "cpu"]
    installed("g2tm", "predict", shapes_run, *words)
    assert (tmp_path / "out/a.png").exists()
    assert installed("g2tm", "prepare", "camvid", "--help").startswith("Usage: g2tm prepare camvid ")
    lazy = "import sys; from g2tm.__main__ import main; assert main and 'torch' not in sys.modules"
    installed("python", "-c", lazy)


# Of the checkout: they start or list its files.
CHECKOUT = ["test_imports", "run_as_files", "every_command_has_a_name", "the_version_is", "command_looks_at_all_splits"]


@pytest.mark.nightly
@pytest.mark.timeout(3600)
def test_the_fast_tests_pass_with_the_wheel(installed, our_setup, tmp_path):
    """Imports of the tests move as those of the wheel do, and names of modules that are a text of their own."""
    named = re.compile(rb"(?<=[\"'])(?=(segm|patch|vis)\.[a-z_]+(\.\w+)*[\"'])")
    shutil.copytree(
        ROOT / "tests", tmp_path / "tests", ignore=shutil.ignore_patterns("__pycache__", "scripts", "test_*")
    )
    for room in ("g2tm", "patch", "segm", "vis"):
        shutil.copytree(ROOT / "tests" / room, tmp_path / "tests" / room, dirs_exist_ok=True)
    for file in (tmp_path / "tests").rglob("*.py"):
        file.write_bytes(named.sub(b"g2tm.", our_setup["below_g2tm"](file.read_bytes())))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    ours = "not slow and not nightly"
    installed(
        "python", "-m", "pytest", "-q", "-m", ours, "-k", " and ".join(f"not {one}" for one in CHECKOUT), cwd=tmp_path
    )
