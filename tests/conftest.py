"""What several test files share."""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path

# The models of most tests are so small that threads only wait for each other, above all where pytest-xdist fills
# the machine. Programs that a test starts inherit this; torch and OpenCV read it when they are imported.
os.environ |= {"OMP_NUM_THREADS": "1", "OPENCV_FOR_THREADS_NUM": "1"}

import pytest

# torch is imported where it is used: the first process of pytest-xdist runs no test, and the others wait for it.
from segm import parallel

DATA = Path(__file__).parent / "data"
parallel.MOST_WORKERS = 0  # by default: to start a worker takes longer than to read a test's few images


def pytest_configure(config):
    """No test depends on the user's data or on what an earlier run compiled, and none leaves anything behind."""
    if hasattr(config, "workerinput"):
        return  # a process of pytest-xdist: it has the environment of the first one
    folder = tempfile.mkdtemp(prefix="pytest-caches-")
    config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ.pop("DATASET", None)
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "MPLCONFIGDIR"):
        os.environ[name] = str(Path(folder, name.lower()))


@pytest.fixture(scope="session")
def imported():
    """Names of the modules whose objects are left out of the collection of garbage."""
    return set()


@pytest.fixture(autouse=True)
def short_collections(imported):
    """Collections of garbage pass over the million objects that imports make; mmengine alone asks for one per list."""
    yield
    if len(imported) < len(sys.modules):
        imported.update(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def cases():
    """Conformance vectors by name, in float32 where they are floating point."""
    from safetensors.torch import load_file

    tensors = load_file(DATA / "cases.safetensors")
    return {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}


@pytest.fixture
def golden_model():
    """The small Segmenter of the conformance vectors."""
    from segm.model.factory import load_model

    return load_model(DATA)[0]


@pytest.fixture(autouse=True)
def seed():
    """Random tensors of a test are the same in every run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture
def small_net():
    """Settings of a Segmenter that runs in milliseconds."""
    return {
        "backbone": "vit_tiny_patch16_384",
        "image_size": [32, 32],
        "patch_size": 8,
        "d_model": 32,
        "n_heads": 2,
        "n_layers": 3,
        "n_cls": 5,
        "decoder": {"name": "mask_transformer", "n_layers": 1, "dropout": 0.0},
    }


@pytest.fixture
def shapes_run(tmp_path, small_net):
    """A run directory on `shapes` at 32x32 pixels, with random weights."""
    from segm.checkpoint import save_checkpoint
    from segm.model.factory import create_segmenter
    from tests.helpers import write_variant

    net, size = small_net | {"n_cls": 11, "normalization": "vit"}, 32
    folder = tmp_path / "run"
    folder.mkdir()
    save_checkpoint({"model": create_segmenter(net).state_dict(), "epoch": 0}, folder / "checkpoint.pth")
    data = {"dataset": "shapes", "image_size": size, "crop_size": size, "patch_type": "pure"}
    inference = {"im_size": size, "window_size": size, "window_stride": size}
    write_variant({"net_kwargs": net, "dataset_kwargs": data, "inference_kwargs": inference}, folder)
    return folder


@pytest.fixture
def few_shapes(monkeypatch):
    """`shapes` with so few images that an epoch takes a moment; in this process alone."""
    monkeypatch.setattr("segm.data.shapes.LENGTHS", {"train": 32, "val": 6})


def _invoke(command, arguments):
    """Run a command in this process; errors other than an exit are raised."""
    from click.testing import CliRunner

    result = CliRunner().invoke(command.main, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture(scope="session")
def call():
    """Run a command that must succeed; returns what it prints on stdout."""

    def run(command, *arguments):
        result = _invoke(command, arguments)
        assert result.exit_code == 0, result.output
        return result.stdout

    return run


@pytest.fixture(scope="session")
def refused():
    """Run a command that must fail; returns its error message: one line, no traceback."""

    def run(command, *arguments):
        result = _invoke(command, arguments)
        assert result.exit_code != 0, result.output
        assert "Traceback" not in result.output and result.stderr.count("Error: ") == 1
        text = result.stderr[result.stderr.index("Error: ") :].strip()
        assert "\n" not in text, text
        return text

    return run


@pytest.fixture(scope="session")
def forked():
    """Runs commands in processes of their own: a `tests.forked.Server`."""
    from tests.forked import Server

    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="session")
def folder_data(tmp_path_factory):
    """The user's own data: six photographs with masks of three classes."""
    import cv2
    import numpy as np

    root = tmp_path_factory.mktemp("own")
    rng = np.random.default_rng(0)
    for split, count in (("train", 4), ("val", 2)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        for index in range(count):
            mask = rng.integers(0, 3, (5, 6), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            cv2.imwrite(str(root / f"images/{split}/{index}.jpg"), (mask * 90)[..., None].repeat(3, 2))
            cv2.imwrite(str(root / f"annotations/{split}/{index}.png"), mask)
    (root / "classes.yml").write_text("[floor, wall, door]")
    return root
