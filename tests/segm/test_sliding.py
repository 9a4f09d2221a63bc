"""Sliding windows and the views of an image."""

from itertools import product

import numpy as np
import pytest
import torch

from segm.data import create_dataset
from segm.eval.evaluate import MULTISCALE, evaluate, image_views
from segm.eval.sliding import Windows, predict_labels, sliding_logits, view_logits, window_starts
from segm.model.upsample import resized_label_map, upsample


def by_pixel(images):
    """A 'model' whose logits are the pixels themselves, so that windows can be checked by their result."""
    return images * 2


def test_windows_lie_at_the_stride_and_at_the_far_edge():
    for arguments, starts in {
        (10, 10, 5): [0], (11, 10, 5): [0, 1], (20, 10, 5): [0, 5, 10], (23, 10, 10): [0, 10, 13], (8, 10, 5): [0],
    }.items():  # fmt: skip
        assert window_starts(*arguments) == starts


def test_every_pixel_is_covered_and_averaged():
    for size, window, batch_size in product([(16, 16), (20, 37), (33, 16)], (16, (8, 16), (16, 11)), (1, 4, 100)):
        image = torch.randn(3, *size)
        torch.testing.assert_close(sliding_logits(by_pixel, image, Windows.of(window, 7, batch_size)), image * 2)


def test_a_small_image_is_scaled_up_to_the_window():
    logits = sliding_logits(by_pixel, torch.randn(3, 10, 25), Windows.of(16, 16))
    assert logits.shape == (3, 16, 40)
    for size, expected in (((12, 16), (12, 16)), ((6, 8), (12, 16)), ((6, 10), (12, 20)), ((9, 8), (18, 16))):
        assert sliding_logits(by_pixel, torch.randn(3, *size), Windows.of((12, 16), 12)).shape == (3, *expected)


def test_an_image_of_the_windows_size_is_one_pass():
    seen = []
    image = torch.randn(3, 12, 16)
    sliding_logits(lambda images: seen.append(images) or images, image, Windows.of((12, 16), (6, 8)))
    assert len(seen) == 1 and torch.equal(seen[0][0], image)


def test_a_view_comes_back_at_the_original_size_and_unflipped():
    image = torch.randn(3, 16, 16)
    plain = view_logits(by_pixel, image, False, Windows.of(16, 16), (16, 16))
    mirrored = view_logits(by_pixel, image.flip(-1), True, Windows.of(16, 16), (16, 16))
    torch.testing.assert_close(plain, mirrored)
    assert view_logits(by_pixel, image, False, Windows.of(16, 16), (30, 20)).shape == (3, 30, 20)


def test_labels_at_the_original_size_are_found_in_bands(monkeypatch):
    for size, limit in product([(40, 60), (13, 7), (16, 90)], (1, 5000, 10**9)):
        monkeypatch.setattr("segm.model.upsample.BAND_BYTES", limit)
        logits = torch.randn(5, 16, 23)
        expected = upsample(logits.unsqueeze(0), size)[0]
        labels = resized_label_map(logits, size)
        chosen = expected.gather(0, labels.unsqueeze(0))[0]
        torch.testing.assert_close(chosen, expected.max(0).values, atol=1e-5, rtol=0)
        assert (labels == expected.argmax(0)).float().mean() > 0.999


@pytest.mark.parametrize("size", [(16, 90), (90, 16), (33, 50), (200, 8)])
def test_large_images_are_done_in_bands(monkeypatch, size):
    """The same labels, views of other scales and mirrored ones included, with logits of a part at a time."""
    windows, image, shapes = Windows.of(16, 12), torch.randn(3, *size), []
    scaled = torch.nn.functional.interpolate(image[None], scale_factor=1.5, mode="bilinear")[0]
    for views in ([(image, False)], [(image, False), (image.flip(-1), True), (scaled, False), (scaled.flip(-1), True)]):
        expected = predict_labels(by_pixel, views, windows, size)
        with monkeypatch.context() as context:
            context.setattr("segm.eval.sliding.MOST_PIXELS", 400)
            context.setattr("segm.eval.sliding.BAND_PIXELS", 400)
            context.setattr("segm.eval.sliding.upsample", lambda x, new: (shapes.append(new), upsample(x, new))[1])
            found = predict_labels(by_pixel, views, windows, size)
        assert (found == expected).float().mean() > 0.999
    assert max(height * width for height, width in shapes) <= 400


def test_probabilities_of_all_views_are_summed():
    images = [torch.randn(3, 16, 16) for _ in range(3)]
    windows = Windows.of(16, 16)
    expected = sum((2 * image).softmax(0) for image in images).argmax(0)
    assert torch.equal(predict_labels(by_pixel, [(image, False) for image in images], windows, (16, 16)), expected)


def test_multiscale_has_six_scales_and_their_mirror_images():
    dataset = create_dataset("shapes", "val", image_size=64)
    views = image_views(dataset, dataset[0].image, MULTISCALE, flip=True)
    assert [tuple(v.shape[-2:]) for v, _ in views[:6]] == [(s, s) for s in (32, 48, 64, 80, 96, 112)]
    assert [flipped for _, flipped in views] == [False] * 6 + [True] * 6
    assert torch.equal(views[0][0].flip(-1), views[6][0])


def test_evaluation_counts_every_pixel_of_every_image_once():
    dataset, seen, windows = create_dataset("shapes", "val", image_size=32, length=5), [], Windows.of(32, 32)

    def constant(images):
        return torch.zeros(len(images), 11, *images.shape[-2:]).index_fill(1, torch.tensor([4]), 1)

    confusion = evaluate(constant, dataset, windows, on_image=lambda s, labels: seen.append((s.name, labels)))
    truth = np.bincount(np.concatenate([dataset[i].label.ravel() for i in range(5)]), minlength=11)
    assert torch.equal(confusion.sum(1), torch.from_numpy(truth)) and confusion[:, 4].sum() == 5 * 32 * 32
    assert [name for name, _ in seen] == [dataset[i].name for i in range(5)]
    assert all(labels.shape == (32, 32) and (labels == 4).all() for _, labels in seen)
    assert evaluate(constant, dataset, windows, n_images=2).sum() == 2 * 32 * 32


def test_impossible_windows_are_refused():
    for arguments in ((0, 1), (16, 0), (16, 17), (16, 16, 0)):
        with pytest.raises(ValueError, match="window"):
            Windows.of(*arguments)
