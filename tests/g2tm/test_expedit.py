"""Expedit: a slow reference, the way back, budgets."""

import math

import pytest
import torch

from g2tm import cluster_grid, expedit, mix, nearest_weights
from tests.helpers import Waits


def by_definition(x, grid, clusters, iterations, window, temperature):
    """Cluster tokens of one image, (P, D), from loops over tokens and clusters."""
    (gh, gw), (h, w) = grid, clusters
    places = [(y, z) for y in range(gh) for z in range(gw)]
    cells = [(r, q) for r in range(h) for q in range(w)]

    def inside(own, side, n, place):
        return math.floor(own * side / n) <= place < math.ceil((own + 1) * side / n)

    pools = [[inside(r, gh, h, y) and inside(q, gw, w, z) for y, z in places] for r, q in cells]
    centers = torch.stack([x[torch.tensor(pool)].mean(0) for pool in pools])
    for _ in range(iterations):
        shares = torch.zeros(len(places), len(cells), dtype=x.dtype)
        for token, (y, z) in enumerate(places):
            home = min(y * h // gh, h - 1), min(z * w // gw, w - 1)
            for cluster, cell in enumerate(cells):
                if all(abs(a - b) <= window // 2 for a, b in zip(home, cell, strict=True)):
                    distance = (x[token] - centers[cluster]).square().sum()
                    shares[token, cluster] = (-temperature * distance).exp()
        shares /= shares.sum(1, keepdim=True)
        centers = (shares.T @ x) / shares.sum(0).unsqueeze(1)
    return centers


CASES = [
    ((4, 6), (2, 3), 5, 5, 0.02),
    ((5, 3), (3, 3), 2, 1, 0.5),
    ((3, 8), (1, 5), 1, 3, 0.1),
    ((6, 6), (6, 6), 3, 3, 1),
]


def test_clusters_are_those_of_the_definition():
    for grid, clusters, iterations, window, temperature in CASES:
        x = torch.randn(2, grid[0] * grid[1], 5).double()
        rule = {"iterations": iterations, "window": window, "temperature": temperature}
        step = expedit(x, grid, clusters=clusters, **rule)
        expected = torch.stack([by_definition(image, grid, clusters, *rule.values()) for image in x])
        torch.testing.assert_close(step.merge(x), expected)
        assert step.grid == clusters and step.lengths == (clusters[0] * clusters[1],) * 2
        torch.testing.assert_close(step.sizes.sum(1), torch.full((2,), float(x.shape[1])))
        assert not hasattr(step, "assignment") and step.nearest.shape == x.shape[:2]
        together = step.unmerge(step.merge(x))
        for index, image in enumerate(x):
            alone = expedit(image[None], grid, clusters=clusters, **rule)
            torch.testing.assert_close(alone.unmerge(alone.merge(image[None]))[0], together[index])


def test_without_rounds_tokens_are_pooled():
    x = torch.randn(2, 35, 4)
    step = expedit(x, (7, 5), clusters=(3, 2), iterations=0)
    expected = torch.nn.functional.adaptive_avg_pool2d(x.unflatten(1, (7, 5)).permute(0, 3, 1, 2), (3, 2))
    torch.testing.assert_close(step.merge(x), expected.flatten(2).transpose(1, 2))
    torch.testing.assert_close(step.sizes, torch.full((2, 6), 35 / 6))


def test_the_mix_is_that_of_the_definition():
    x, tokens, y = torch.randn(2, 9, 4), torch.randn(2, 5, 4), torch.randn(2, 5, 3)
    values = (-0.3 * torch.cdist(x, tokens).square()).exp()
    for k, kept in ((3, 3), (7, 5), (-1, 5), (1, 1)):
        least = values.topk(kept).values[..., -1:]
        own = values.where(values >= least, 0)
        for weighting, order in (("euclidean", 2), ("published", 2), ("sum", 1)):
            found = nearest_weights(x, tokens, k=k, temperature=0.3, weighting=weighting)
            assert found[0].shape == (2, 9, kept)
            expected = torch.nn.functional.normalize(own, p=order, dim=-1) @ y
            torch.testing.assert_close(mix(y, *found), expected, atol=1e-5, rtol=1e-5)
            by_rows = torch.func.vmap(mix)(y[None], found[0][None], found[1][None])[0]
            torch.testing.assert_close(by_rows, expected, atol=1e-5, rtol=1e-5)
            assert mix(y.bfloat16(), *found).dtype == torch.bfloat16


def test_far_tokens_fade_as_published_alone():
    x, tokens, y = 30 * torch.randn(1, 6, 4), torch.zeros(1, 3, 4), torch.ones(1, 3, 2)
    for weighting, expected in (("published", 0.0), ("euclidean", math.sqrt(3)), ("sum", 1.0)):
        found = nearest_weights(x, tokens, k=3, temperature=1.0, weighting=weighting)
        torch.testing.assert_close(mix(y, *found), torch.full((1, 6, 2), expected))


def test_gradients():
    """Shares are constants, weights of the way back are not."""
    x = torch.randn(1, 12, 3, dtype=torch.float64, requires_grad=True)
    step = expedit(x, (3, 4), clusters=(2, 2), temperature=0.3, k=2)
    (own,) = torch.autograd.grad(step.merge(x).sum(), x)
    assert not step._shares.requires_grad
    torch.testing.assert_close(own.sum(), torch.tensor(12.0, dtype=torch.float64))  # every mean passes one on
    y = torch.randn(1, 4, 2, dtype=torch.float64)

    def restored(tokens, before):
        return mix(y, *nearest_weights(before, tokens, k=2, temperature=0.3, weighting="euclidean"))

    assert torch.autograd.gradcheck(restored, (step.merge(x).detach().requires_grad_(), x))
    far = (100 * torch.randn(1, 12, 3)).requires_grad_()
    step = expedit(far, (3, 4), clusters=(2, 2), temperature=1.0, weighting="published")
    step.unmerge(step.merge(far)).sum().backward()
    assert far.grad.isfinite().all()


def test_selection_is_in_float32_and_waits_for_nothing():
    x = torch.randn(1, 64, 16)
    with torch.autocast("cpu", torch.bfloat16), Waits() as waits:
        step = expedit(x.bfloat16().float(), (8, 8), clusters=(4, 4))
        found = step.unmerge(step.merge(x.bfloat16()))
    assert waits.count == 0 and found.dtype == torch.bfloat16 and step._shares.dtype == torch.float32
    exact = expedit(x.bfloat16().float(), (8, 8), clusters=(4, 4))
    torch.testing.assert_close(step._shares, exact._shares)
    none = expedit(torch.randn(0, 12, 4), (3, 4), clusters=(2, 2))
    assert none.unmerge(none.merge(torch.randn(0, 12, 4))).shape == (0, 12, 4)


def test_a_budget_gives_a_grid_of_the_shape_of_the_image():
    assert cluster_grid(784, (40, 40)) == (28, 28) and cluster_grid(0.5, (40, 40)) == (28, 28)
    assert cluster_grid(1, (40, 40)) == (1, 1) and cluster_grid(1.0, (3, 17)) == (3, 17)
    for tokens in range(1, 6 * 11 + 1):
        h, w = cluster_grid(tokens, (6, 11))
        assert 1 <= h <= 6 and 1 <= w <= 11 and h * w <= tokens


def test_refused():
    x = torch.randn(1, 12, 4)
    for given, message in (
        ({"clusters": (4, 4)}, r"clusters 4×4: give rows and columns from 1×1 to the grid's 3×4"),
        ({"clusters": (0, 4)}, "clusters 0×4"),
        ({"window": 4}, "window 4: give an odd number"),
        ({"iterations": -1}, "iterations -1: give a number of rounds"),
        ({"k": 0}, "k 0: give a number of tokens from 1, or -1 for all"),
        ({"weighting": "max"}, "weighting 'max': choose euclidean, published or sum"),
    ):
        with pytest.raises(ValueError, match=message):
            expedit(x, (3, 4), **{"clusters": (2, 2)} | given)
