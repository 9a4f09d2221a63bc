"""CLAP: windows, order, batches, errors."""

from itertools import combinations

import pytest
import torch

from g2tm import clap
from g2tm.windows import window_similarities


def grid_windows(grid, window):
    """Patches of every whole window: (W, height·width)."""
    rows, columns = grid[0] // window[0], grid[1] // window[1]
    index = torch.arange(grid[0] * grid[1]).view(grid)[: rows * window[0], : columns * window[1]]
    return index.reshape(rows, window[0], columns, window[1]).transpose(1, 2).reshape(rows * columns, -1)


def by_definition(x, grid, window, threshold):
    """Assignment of one image, pair by pair."""
    unit = torch.nn.functional.normalize(x.double(), dim=-1)
    found = []
    for top in range(0, grid[0] - window[0] + 1, window[0]):
        for left in range(0, grid[1] - window[1] + 1, window[1]):
            tokens = [(top + i) * grid[1] + left + j for i in range(window[0]) for j in range(window[1])]
            pairs = [(unit[a] @ unit[b]).item() for a, b in combinations(tokens, 2)]
            if sum(pairs) / len(pairs) >= threshold:
                found.append((-sum(pairs) / len(pairs), tokens))
    assignment = {}
    for place, (_, tokens) in enumerate(sorted(found)):
        assignment |= dict.fromkeys(tokens, place)
    for token in range(len(x)):
        if token not in assignment:
            assignment[token] = len(set(assignment.values()))
    return [assignment[token] for token in range(len(x))]


@pytest.mark.parametrize("window", [(2, 2), (1, 2), (2, 1), (2, 3), (4, 4)])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (4, 9)])
@pytest.mark.parametrize("threshold", [-1.0, 0.0, 0.2, 1.0])
def test_assignment_is_that_of_the_definition(window, grid, threshold):
    x = torch.randn(3, grid[0] * grid[1], 4)
    reduction = clap(x, grid, threshold, window=window)
    for image in range(3):
        expected = by_definition(x[image], grid, window, threshold)
        assert reduction.assignment[image].tolist() == expected
        assert reduction.counts[image] == max(expected) + 1


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


def test_a_window_that_is_not_finite_does_not_merge():
    x = torch.randn(1, 16, 3)
    x[0, 0] = float("nan")
    similarity = window_similarities(x, (4, 4), (2, 2))[0]
    assert similarity[0] == float("-inf")
    second = similarity.sort().values[-1].item()
    reduction = clap(x, (4, 4), second)
    assert reduction.counts.item() == 13 and (reduction.assignment == reduction.assignment[0, 0]).sum() == 1


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"threshold": 1.1}, "-1 to 1"),
        ({"window": (5, 2)}, "larger than the grid"),
        ({"window": (0, 2)}, "height and width"),
        ({"window": 2}, "height and width"),
        ({"window": None}, "height and width"),
        ({"window": (1, 1)}, "at least two"),
        ({"grid": (3, 3)}, "does not hold"),
        ({"batch": "even"}, "ragged or uniform"),
    ],
)
def test_bad_arguments_are_named(arguments, allowed):
    with pytest.raises(ValueError, match=allowed):
        clap(torch.randn(1, 16, 3), **({"grid": (4, 4), "threshold": 0.5} | arguments))
