"""CLAP: windows, order, batches, errors."""

from itertools import combinations

import pytest
import torch

from g2tm import clap
from g2tm.clap import window_similarities
from tests.g2tm.oracle import assert_each_is_alone


def grid_windows(grid, window):
    """Patches of every whole window: (W, height·width)."""
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    index = torch.arange(grid[0] * grid[1]).view(grid)[: rows * window[0], : columns * window[1]]
    return index.reshape(rows, window[0], columns, window[1]).transpose(1, 2).reshape(rows * columns, -1)


def by_definition(x, grid, window, threshold=-2.0, tokens=0):
    """Assignment of one image, pair by pair: windows of at least the threshold, while more than `tokens` are left."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    found = []
    for top in range(0, grid[0] - window[0] + 1, window[0]):
        for left in range(0, grid[1] - window[1] + 1, window[1]):
            patches = [(top + i) * grid[1] + left + j for i in range(window[0]) for j in range(window[1])]
            pairs = [(unit[a] @ unit[b]).item() for a, b in combinations(patches, 2)]
            if sum(pairs) / len(pairs) >= threshold:
                found.append((-sum(pairs) / len(pairs), patches))
    assignment, surplus = {}, len(x) - tokens
    for place, (_, patches) in enumerate(sorted(found)):
        if surplus < len(patches) - 1:
            mean = unit[patches].mean(0)
            patches = sorted(patches, key=lambda patch: -(unit[patch] @ mean).item())[: surplus + 1]
        if surplus > 0:
            assignment |= dict.fromkeys(patches, place)
            surplus -= len(patches) - 1
    for token in range(len(x)):
        if token not in assignment:
            assignment[token] = len(set(assignment.values()))
    return [assignment[token] for token in range(len(x))]


def test_assignment_is_that_of_the_definition():
    for grid in ((8, 8), (5, 7), (4, 9)):
        for window in ((2, 2), (1, 2), (2, 1), (2, 3), (4, 4)):
            x = torch.randn(3, grid[0] * grid[1], 4)
            for threshold in (-1.0, 0.0, 0.2, 1.0):
                reduction = clap(x, grid, threshold, window=window)
                for image in range(3):
                    expected = by_definition(x[image], grid, window, threshold)
                    assert reduction.assignment[image].tolist() == expected
                    assert reduction.counts[image] == reduction.lengths[image] == max(expected) + 1


def test_a_budget_leaves_exactly_so_many_tokens():
    for grid, window in (((8, 8), (2, 2)), ((5, 7), (2, 3)), ((4, 9), (4, 4)), ((1, 6), (1, 2)), ((3, 3), (3, 3))):
        x, n_tokens = torch.randn(2, grid[0] * grid[1], 4), grid[0] * grid[1]
        fewest = min(clap(x, grid, -1.0, window=window).lengths)
        for tokens in range(fewest, n_tokens + 1):
            reduction = clap(x, grid, None, tokens=tokens, window=window)
            assert reduction.counts.tolist() == list(reduction.lengths) == [tokens] * 2 and reduction.padding is None
            for image in range(2):
                expected = by_definition(x[image], grid, window, tokens=tokens)
                assert reduction.assignment[image].tolist() == expected
        for tokens in (fewest - 1, n_tokens + 1, 0.5, True):
            with pytest.raises(ValueError, match=f"{fewest} to {n_tokens}"):
                clap(x, grid, None, tokens=tokens, window=window)


def test_budget_and_threshold_agree():
    for x in torch.randn(4, 1, 35, 3):
        for threshold in (-0.2, 0.1, 0.4):
            expected = clap(x, (5, 7), threshold)
            found = clap(x, (5, 7), threshold, tokens=expected.lengths[0])
            assert torch.equal(found.assignment, expected.assignment) and torch.equal(found.counts, expected.counts)


def test_of_equal_patches_a_budget_takes_the_first():
    reduction = clap(torch.ones(1, 16, 3), (4, 4), None, tokens=11)
    assert reduction.assignment.view(4, 4).tolist() == [[0, 0, 1, 1], [0, 0, 1, 2], [3, 4, 5, 6], [7, 8, 9, 10]]


def test_batches_of_no_image_and_tokens_without_a_direction():
    strange = [torch.full((2, 20, 3), value) for value in (0.0, 1.0, float("nan"), float("inf"))]
    for x in (torch.randn(0, 20, 3), *strange):
        for arguments in ({}, {"batch": "uniform"}, {"tokens": 13}):
            reduction = clap(x, (4, 5), 0.5, **arguments)
            assert (reduction.sizes.sum(1) == 20).all() and len(reduction.lengths) == len(x)
            assert reduction.unmerge(reduction.merge(x)).shape == x.shape


def test_similarity_of_a_window_is_the_mean_over_its_pairs():
    x, windows = torch.randn(2, 24, 5), grid_windows((4, 6), (2, 2))
    unit = torch.nn.functional.normalize(x, dim=-1)[:, windows]
    expected = torch.stack([(unit[:, :, a] * unit[:, :, b]).sum(-1) for a, b in combinations(range(4), 2)]).mean(0)
    torch.testing.assert_close(window_similarities(x, (4, 6), (2, 2)), expected)


def test_windows_over_the_edge_are_left_alone():
    reduction = clap(torch.ones(1, 35, 3), (5, 7), 0.5)
    assert reduction.counts.item() == 6 + 35 - 24
    assert reduction.assignment.view(5, 7)[4].unique().numel() == 7


def test_uniform_merges_as_many_windows_as_the_image_that_merges_least():
    x = torch.randn(3, 64, 4) + torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1)
    ragged, uniform = clap(x, (8, 8), 0.5), clap(x, (8, 8), 0.5, batch="uniform")
    most = ragged.counts.max()
    assert torch.equal(uniform.counts, most.expand(3)) and uniform.padding is None
    similarity = window_similarities(x, (8, 8), (2, 2))
    n_merged = (64 - most.item()) // 3
    for image in range(3):
        chosen = similarity[image].argsort(descending=True)[:n_merged]
        groups = grid_windows((8, 8), (2, 2))[chosen]
        assert uniform.assignment[image][groups].tolist() == [[place] * 4 for place in range(n_merged)]


def test_a_batch_equals_its_images():
    x = torch.randn(4, 30, 3)
    batch = clap(x, (5, 6), 0.2)
    for image in range(4):
        alone = clap(x[image : image + 1], (5, 6), 0.2)
        assert torch.equal(batch.assignment[image], alone.assignment[0])


def test_padding_of_whole_rows_is_a_smaller_grid():
    x, sizes = torch.randn(3, 48, 3), torch.randint(0, 4, (3, 48)).float()

    def merge(x, sizes, padding):
        return clap(x, (x.shape[1] // 6, 6), 0.1, sizes=sizes, padding=padding)

    assert_each_is_alone(merge, x, [48, 36, 12], None)
    assert_each_is_alone(merge, x, [30, 48, 24], sizes)


def test_a_window_with_padding_does_not_merge():
    x, padding = torch.ones(2, 16, 3), torch.zeros(2, 16, dtype=torch.bool)
    padding[0, 15:] = padding[1, 9:] = True
    step = clap(x, (4, 4), 0.5, padding=padding)
    assert step.assignment[0, :15].view(-1).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 4, 2, 2, 5]
    assert step.assignment[1, :9].tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2]
    assert step.lengths == (6, 3) and step.sizes.sum(1).tolist() == [15, 9]
    uniform = clap(x, (4, 4), 0.5, padding=padding, batch="uniform")
    assert uniform.lengths == (15 - 6, 9 - 6)
    with pytest.raises(ValueError, match="no padding"):
        clap(x, (4, 4), None, tokens=10, padding=padding)


def test_a_window_that_is_not_finite_does_not_merge():
    x = torch.randn(1, 16, 3)
    x[0, 0] = float("nan")
    similarity = window_similarities(x, (4, 4), (2, 2))[0]
    assert similarity[0] == float("-inf")
    second = similarity.sort().values[-1].item()
    reduction = clap(x, (4, 4), second)
    assert reduction.counts.item() == 13 and (reduction.assignment == reduction.assignment[0, 0]).sum() == 1


def test_bad_arguments_are_named():
    for arguments, allowed in (
        ({"threshold": 1.1}, "-1 to 1"),
        ({"threshold": None}, "-1 to 1"),
        ({"window": (5, 2)}, "larger than the grid"),
        ({"window": (0, 2)}, "height and width"),
        ({"window": 2}, "height and width"),
        ({"window": None}, "height and width"),
        ({"window": (1, 1)}, "at least two"),
        ({"grid": (3, 3)}, "does not hold"),
        ({"batch": "even"}, "ragged or uniform"),
    ):
        with pytest.raises(ValueError, match=allowed):
            clap(torch.randn(1, 16, 3), **({"grid": (4, 4), "threshold": 0.5} | arguments))
    with pytest.raises(ValueError, match="larger than the grid"):
        clap(torch.randn(1, 1, 3), (1, 1), 0.5)
