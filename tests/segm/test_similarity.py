"""Similarities of tokens by class, from a trained run and the labels of its images."""

import json
from collections import Counter

import cv2
import numpy as np
import pytest
import torch

from segm import similarity
from segm.run import Run

CPU = ["--device", "cpu"]


@pytest.fixture
def run(shapes_run, few_shapes):
    return Run.load(shapes_run, device="cpu")


def test_patches_have_the_class_of_most_of_their_pixels(run):
    """By counting, of label maps that are larger and smaller than the crop; without labels a patch has no class."""
    rng = np.random.default_rng(0)
    for shape in ((32, 32), (20, 30), (50, 41)):
        labels = rng.choice([0, 1, 2, 255], shape).astype(np.uint8)
        labels[: shape[0] // 4, : shape[1] // 4] = 255
        pixels = [Counter() for _ in range(16)]
        for (y, x), label in np.ndenumerate(labels):
            row, column = (int((at + 0.5) * 4 / length) for at, length in zip((y, x), shape, strict=True))
            pixels[row * 4 + column][int(label)] += label != 255
        expected = [max(range(11), key=lambda one: one_patch[one]) if one_patch.total() else -1 for one_patch in pixels]
        assert similarity.patch_classes(labels, run).tolist() == expected and expected[0] == -1


@torch.inference_mode()
def test_means_are_those_of_all_pairs(run):
    dataset, _ = run.open()
    samples, seen = [dataset[0], dataset[1]], []
    found = similarity.collect(run, samples, [1, 3], [2, 0])
    handle = run.model.encoder.blocks[2].norm2.register_forward_pre_hook(lambda m, i: seen.append(i[0][0, 1:]))
    for sample in samples:
        run.model(run.preprocess_resized(sample.image))
    handle.remove()
    pairs = {(side, kind): [] for side in (2, 0) for kind in (True, False)}
    for sample, tokens in zip(samples, seen, strict=True):
        unit = torch.nn.functional.normalize(tokens.double(), dim=-1)
        classes = similarity.patch_classes(sample.label, run)
        for i, j in torch.triu_indices(16, 16, 1).T.tolist():
            cosine, same = float(unit[i] @ unit[j]), bool(classes[i] == classes[j])
            pairs[0, same].append(cosine)
            if i // 8 == j // 8 and i % 4 // 2 == j % 4 // 2:
                pairs[2, same].append(cosine)
    assert [*found] == [(1, 2), (1, 0), (3, 2), (3, 0)] and all(pairs.values())
    for (side, same), cosines in pairs.items():
        count, total = found[3, side][0 if same else 1].tolist()
        assert count == len(cosines) and total == pytest.approx(sum(cosines), rel=1e-5)


def test_the_command_prints_a_row_per_layer_and_draws_them(run, tmp_path, call):
    printed = call(similarity, run.path, "shapes", "--selected-layers", 1, 3, "--max-images", 2, *CPU)
    head, _, *rows = (line for line in printed.splitlines() if line.startswith("|"))
    assert head == "| layer | 2 × 2 | image |"  # of 4 × 4 patches
    record = json.loads((run.path / "similarity_shapes/similarity.json").read_text())
    assert record["n_images"] == 2 and [(one["layer"], one["window"]) for one in record["rows"]] == [
        (1, 2), (1, 0), (3, 2), (3, 0)
    ]  # fmt: skip
    for line, one in zip(rows, record["rows"][1::2], strict=True):
        assert line.endswith(f"| {one['same']:.3f} / {one['different']:.3f} |")
    assert cv2.imread(str(run.path / "similarity_shapes/similarity.png")).std() > 0
    call(similarity, run.path, "shapes", "--windows", 3, "--max-images", 1, "--out", tmp_path / "own", *CPU)
    rows = json.loads((tmp_path / "own/similarity.json").read_text())["rows"]
    assert [one["window"] for one in rows] == [3, 3, 3]


def test_what_is_not_there_is_refused(run, tmp_path, refused):
    for options, hint in (
        (["--windows", 4], "sides from 2 to 3"),
        (["--windows", 1], "sides from 2 to 3"),
        (["--selected-layers", 4], "1 to 3"),
        (["--selected-layers", 2, 1], "ascending"),
    ):
        assert hint in refused(similarity, run.path, "shapes", *options, "--out", tmp_path / "out", *CPU)
    assert not (tmp_path / "out").exists()
