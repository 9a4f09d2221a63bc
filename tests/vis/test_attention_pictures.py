"""Attention, token and label pictures as functions on arrays."""

import numpy as np
import pytest

from vis import (
    attention_map,
    attention_pictures,
    color_attention,
    colorize,
    enlarge,
    fill_tokens,
    label_picture,
    legend,
    magnification,
    outline_tokens,
    overlay_attention,
    spread_weights,
    token_pictures,
)

GRID, PATCH = (3, 5), (16, 16)
SHAPE = (48, 80)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def image(rng):
    return rng.integers(1, 250, (*SHAPE, 3), dtype=np.uint8)


def partition(rng, n_patches=15, n_tokens=6):
    """(N,): every token carries at least one patch."""
    return rng.permutation(np.concatenate([np.arange(n_tokens), rng.integers(0, n_tokens, n_patches - n_tokens)]))


def test_every_patch_has_the_weight_of_its_token(rng):
    for heads in ((), (3,), (2, 3)):
        assignment, weights = partition(rng), rng.random((*heads, 6))
        spread = spread_weights(weights, assignment)
        assert spread.shape == (*heads, 15)
        for token in range(6):
            assert (spread[..., assignment == token] == weights[..., token, None]).all()


def test_without_a_merge_weights_stay_as_they_are(rng):
    weights = rng.random((2, 15))
    assert (spread_weights(weights) == weights).all()


def test_unsmoothed_maps_are_exact_per_patch(rng):
    weights = rng.random(15)
    values = attention_map(weights, GRID, PATCH, SHAPE, sigma=0)
    blocks = values.reshape(3, 16, 5, 16).transpose(0, 2, 1, 3).reshape(15, -1)
    assert np.allclose(blocks, (weights / weights.max())[:, None])


def test_maps_fit_the_picture_and_span_zero_to_one(rng):
    for shape in (SHAPE, (40, 75), (33, 65)):
        values = attention_map(rng.random(15), GRID, PATCH, shape)
        assert values.shape == shape and values.dtype == np.float32
        assert values.min() >= 0 and values.max() == 1


def test_even_attention_is_even_and_none_is_dark():
    assert np.allclose(attention_map(np.full(15, 0.2), GRID, PATCH, SHAPE), 1)
    assert not attention_map(np.zeros(15), GRID, PATCH, SHAPE).any()


def test_what_is_beyond_the_picture_does_not_leak_in(rng):
    """Patches of the padding lie behind the picture."""
    weights = rng.random((3, 5))
    changed = weights.copy()
    changed[:, -1] = 1
    maps = [attention_map(w.ravel(), GRID, PATCH, (48, 64)) for w in (weights, changed)]
    assert (maps[0] == maps[1]).all()


def test_brightness_rises_with_attention():
    colors = color_attention(np.linspace(0, 1, 256, dtype=np.float32)[None])[0].astype(float)
    luminance = colors @ (0.2126, 0.7152, 0.0722)
    assert (np.diff(luminance) >= -1).all() and luminance[-1] - luminance[0] > 200


def test_only_attention_is_colored_in_the_overlay(image):
    values = np.zeros(SHAPE, dtype=np.float32)
    values[:, 40:] = 0.5
    saturation = np.ptp(overlay_attention(image, values).astype(int), axis=-1)
    assert saturation[:, :40].max() <= 2 < saturation[:, 40:].min()


def test_the_token_of_the_query_is_outlined(rng, image):
    assignment = partition(rng)
    weights = rng.random(6)
    plain, overlay = attention_pictures(image, weights, GRID, PATCH, assignment)
    same, marked = attention_pictures(image, weights, GRID, PATCH, assignment, query=7)
    assert (plain == same).all() and plain.shape == overlay.shape == image.shape
    expected = outline_tokens(overlay, assignment == assignment[7], GRID, PATCH, color=(0, 255, 255))
    assert (marked == expected).all() and (marked != overlay).any()
    assert attention_pictures(image, rng.random(15), GRID, PATCH, query=7)[1].shape == image.shape


def test_lines_lie_on_both_sides_of_borders_and_nowhere_else(rng, image):
    assignment = partition(rng)
    changed = (outline_tokens(image, assignment, GRID, PATCH, color=(255, 255, 255)) != image).any(-1)
    groups = assignment.reshape(GRID)
    expected = np.zeros(SHAPE, dtype=bool)
    for y in range(3):
        for x in range(5):
            if x and groups[y, x] != groups[y, x - 1]:
                expected[y * 16 : y * 16 + 16, x * 16 - 1 : x * 16 + 1] = True
            if y and groups[y, x] != groups[y - 1, x]:
                expected[y * 16 - 1 : y * 16 + 1, x * 16 : x * 16 + 16] = True
    assert (changed == expected).all()


def test_token_pictures_bear_the_number_of_tokens(rng, image):
    assignment = partition(rng)
    pictures = token_pictures(image, assignment, GRID, PATCH)
    assert list(pictures) == ["vis_6_tokens", "vis_6_tokens_overlay"]
    assert (pictures["vis_6_tokens"] == fill_tokens(image, assignment, GRID, PATCH)).all()
    unmerged = token_pictures(image, rng.permutation(15), GRID, PATCH)
    assert list(unmerged) == ["grid"]
    assert (unmerged["grid"] == outline_tokens(image, np.arange(15), GRID, PATCH)).all()


def test_many_tokens_are_drawn_as_fast_as_few(rng):
    """16,384 tokens on a megapixel: with a mask per token this would take minutes."""
    image = rng.integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    assert fill_tokens(image, np.arange(128 * 128), (128, 128), (8, 8)).shape == image.shape


def test_label_pictures_name_the_classes_that_occur():
    names, palette = ["sky", "road", "car"], np.array([[0, 0, 255], [255, 0, 0], [0, 255, 0]], dtype=np.uint8)
    labels = np.zeros((96, 64), dtype=np.uint8)
    labels[40:] = 2
    picture = label_picture(labels, names, palette)
    assert (picture[:, :64] == colorize(labels, palette)).all()
    beside = picture[:, 64:]
    assert (beside[12, 15] == palette[0]).all() and (beside[36, 15] == palette[2]).all()
    assert (beside[48:] == 255).all() and not (beside == palette[1]).all(-1).any()
    labels[0, 0] = 255
    assert (label_picture(labels, names, palette)[60, 79] == 0).all()


def test_legends_hold_every_class():
    """All 150 colors are there, in as many columns as needed."""
    palette = np.stack([np.arange(150), np.full(150, 7), np.full(150, 9)], axis=1).astype(np.uint8)
    for height in (None, 24, 120, 480):
        picture = legend([f"class {i}" for i in range(150)], palette, height)
        assert picture.shape[0] == (3600 if height is None else height)
        found = picture[(picture[..., 1] == 7) & (picture[..., 2] == 9)]
        assert set(found[:, 0].tolist()) >= set(range(150))


def test_long_names_are_not_cut():
    for name in ("W" * 60, "Straßenbahn und Gleise", "дорога"):
        picture = legend([name, "a"], np.zeros((2, 3), dtype=np.uint8))
        assert (picture[:, -5:] == 255).all() and (picture[:24, 38:] < 128).any()


def test_small_pictures_are_enlarged_by_a_whole_number(image):
    assert [magnification(shape) for shape in ((128, 300), (192, 192), (512, 512), (2000, 900))] == [5, 3, 1, 1]
    large = enlarge(image, 3)
    assert large.shape == (144, 240, 3) and (large[::3, ::3] == image).all() and (large[2::3, 1::3] == image).all()
    assert enlarge(image[..., 0], 2).shape == (96, 160)
