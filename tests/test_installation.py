"""What an installation without extras does, and where it refuses."""

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
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


def test_another_project_is_not_overwritten(tmp_path):
    code = (
        "import sys, sysconfig, runpy\n"
        f"sysconfig.get_paths = lambda: {{'purelib': {str(tmp_path)!r}}}\n"
        "sys.argv = ['setup.py', '--version']\n"
        "runpy.run_path('setup.py')\n"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 0
    (tmp_path / "patch.py").touch()
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0 and "another project with the import name of ours" in result.stderr


def test_the_source_archive_holds_what_is_needed_to_test_it(tmp_path):
    pytest.importorskip("setuptools")
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("no git here")
    copy = tmp_path / "copy"
    for name in tracked.stdout.split():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, copy / name)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(tmp_path)]
    result = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (archive,) = tmp_path.glob("g2tm-*.tar.gz")
    with tarfile.open(archive) as files:
        held = {"/".join(Path(name).parts[1:]) for name in files.getnames()}
    assert {*tracked.stdout.split()} <= held
