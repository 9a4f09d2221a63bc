"""The soft way back of groupings: by definition, padding, chains."""

import torch

from g2tm import SoftRestored, bipartite, cubist, dct, graph_merge, mutual_pairs

GRID = (4, 6)


def soft(step, x, k=20, temperature=0.3):
    return SoftRestored(step, x, k, temperature)


def by_definition(x, tokens, y, k, temperature):
    """One image: x: (N, D), tokens, y: (M, D) -> (N, D)"""
    distance = torch.cdist(x, tokens).square()
    nearest = distance.argsort(1)[:, :k]
    weights = (-temperature * distance.gather(1, nearest)).softmax(1)
    return (weights.unsqueeze(2) * y[nearest]).sum(1)


def test_patches_are_mixes_of_their_nearest_tokens():
    x = torch.randn(3, 24, 5)
    steps = graph_merge(x, GRID, 0.3), bipartite(x, r=8), mutual_pairs(x), cubist(x, GRID, remove=(1, 2))
    for step in steps:
        restored = soft(step, x, k=4)
        y = step.merge(x) + 1
        for image, length in enumerate(step.lengths):
            expected = by_definition(x[image], step.merge(x)[image, :length], y[image, :length], 4, 0.3)
            torch.testing.assert_close(restored.unmerge(y)[image], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(restored.unmerge(torch.ones_like(y)), torch.ones_like(x))
        assert restored.width == step.width and restored.lengths == step.lengths
        for name in ("assignment", "sizes", "counts"):
            assert torch.equal(getattr(restored, name), getattr(step, name))
        assert torch.equal(restored.merge(x), step.merge(x))


def test_padding_is_none_of_the_tokens():
    x = torch.cat([torch.randn(1, 24, 3), 0.01 * torch.randn(1, 24, 3) + 1])
    step = graph_merge(x, GRID, 0.99)
    assert step.padding is not None and min(step.lengths) < 5
    y = torch.randn(2, step.width, 2)
    y[step.padding] = 1e6
    restored = soft(step, x)
    assert restored.unmerge(y).abs().max() < 100
    for image, length in enumerate(step.lengths):
        alone = soft(graph_merge(x[image][None], GRID, 0.99), x[image][None])
        torch.testing.assert_close(alone.unmerge(y[image][None, :length])[0], restored.unmerge(y)[image])


def test_sharp_weights_are_copies_of_the_nearest():
    x = torch.randn(2, 24, 5)
    step = bipartite(x, r=0)
    torch.testing.assert_close(soft(step, x, temperature=1e4).unmerge(step.merge(x)), x)


def test_every_step_of_a_chain_keeps_its_way_back():
    x = torch.randn(2, 24, 5)
    first = soft(bipartite(x, r=6), x)
    second = soft(bipartite(first.merge(x), r=5, sizes=first.sizes), first.merge(x))
    last = bipartite(second.merge(first.merge(x)), r=3, sizes=second.sizes)
    total = first.then(second).then(last)
    y = torch.randn(2, 10, 4)
    torch.testing.assert_close(total.unmerge(y), first.unmerge(second.unmerge(last.unmerge(y))))
    assert not total.copies and total.assignment.shape == (2, 24) and total.sizes.sum(1).tolist() == [24, 24]
    copied = bipartite(x, r=6).then(soft(bipartite(x[:, :18], r=5), x[:, :18]))
    assert not copied.copies and dct(x, r=4).then(bipartite(x[:, :20], r=4)).copies


def test_gradients_reach_the_weights():
    x = torch.randn(1, 24, 3, dtype=torch.float64, requires_grad=True)
    step = bipartite(x, r=8)
    y = torch.randn(1, 16, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: soft(step, x, k=3).unmerge(y), (x,))
    assert not soft(step, x).detached().mixture[1].requires_grad
