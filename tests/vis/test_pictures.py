"""Pictures as functions on arrays."""

import numpy as np
import pytest

from vis import blend, colorize, confusion_picture, fill_tokens, legend, outline_tokens, picture_sheet

GRID, PATCH = (3, 4), (8, 8)


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


def test_labels_get_their_color_and_ignored_pixels_black():
    palette = np.array([[255, 0, 0], [0, 255, 0]], dtype=np.uint8)
    picture = colorize(np.array([[0, 1, 255]]), palette)
    assert picture.tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 0]]]


def test_a_confusion_matrix_shows_shares_of_the_true_class():
    """Dark where all of a class is found; classes that do not occur take no place."""
    names = ["road", "sky", "car", "tree"]
    right, wrong = np.diag([5, 500, 0, 7]), np.roll(np.diag([5, 500, 0, 7]), 1, axis=1)
    pictures = [confusion_picture(one, names) for one in (right, 3 * right, wrong)]
    assert np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])
    assert pictures[0].shape == confusion_picture(np.diag([1, 2, 3]), names[:3]).shape
    dark = (pictures[0] == (8, 48, 107)).all(-1)  # the end of the color map: three cells on the diagonal
    assert dark.mean() > 0.02


def test_blend_mixes():
    a, b = np.zeros((2, 2, 3), np.uint8), np.full((2, 2, 3), 200, np.uint8)
    assert (blend(a, b, 0.25) == 50).all()


def test_groups_are_filled_with_their_mean(image):
    assignment = np.array([0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 2, 2])
    filled = fill_tokens(image, assignment, GRID, PATCH)
    expected = image[:16, :16].reshape(-1, 3).mean(0).round()
    assert np.abs(filled[3, 3] - expected).max() <= 1 and (filled[3, 3] == filled[10, 10]).all()


def test_outlines_lie_exactly_on_patch_borders(image):
    assignment = np.arange(12)
    changed = (outline_tokens(image, assignment, GRID, PATCH, color=(1, 2, 3)) != image).any(-1)
    rows, columns = np.nonzero(changed)
    assert len(rows) and all(r % 8 == 0 or c % 8 == 0 for r, c in zip(rows, columns, strict=True))
    assert not (outline_tokens(image, np.zeros(12, int), GRID, PATCH) != image).any()


def test_images_smaller_than_the_padded_grid(image):
    assert fill_tokens(image[:20, :30], np.arange(12), GRID, PATCH).shape == (20, 30, 3)


def test_legend_and_sheet_have_a_place_for_everything(image):
    palette = np.array([[255, 0, 0], [0, 255, 0]], dtype=np.uint8)
    picture = legend(["road", "sky"], palette)
    assert picture.shape[0] == 48 and (picture[12, 15] == (255, 0, 0)).all()
    sheet = picture_sheet([[image, image]] * 2, ["a", "b"], [["one", "two"]] * 2)
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3 and sheet.std() > 10
