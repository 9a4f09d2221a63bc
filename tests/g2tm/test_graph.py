"""Graph merging: components, thresholds, batches, errors."""

import networkx
import pytest
import torch

from g2tm import edge_similarities, graph_merge
from g2tm.components import BACKENDS, grid_components
from g2tm.graph import _edge_ends, _strongest_edges

ON_CPU = [backend for backend in BACKENDS if backend != "triton"]


def partition(assignment):
    """The groups of one image as a set of sets: independent of their labels."""
    groups = {}
    for token, group in enumerate(assignment.tolist()):
        groups.setdefault(group, set()).add(token)
    return {frozenset(group) for group in groups.values()}


def grid_partition(x, grid, threshold):
    """The definition, word for word: components of the 4-neighbour graph of similar patches."""
    graph = networkx.grid_2d_graph(*grid)
    tokens = torch.nn.functional.normalize(x.float(), dim=-1).view(*grid, -1)
    for a, b in list(graph.edges):
        if tokens[a] @ tokens[b] <= threshold:
            graph.remove_edge(a, b)
    return {frozenset(r * grid[1] + c for r, c in part) for part in networkx.connected_components(graph)}


def smooth_tokens(n_images, grid, dim=6):
    """Tokens whose neighbours are often similar."""
    noise = torch.randn(n_images, dim, *grid)
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1).flatten(2).transpose(1, 2)


@pytest.mark.parametrize("backend", ON_CPU)
@pytest.mark.parametrize("grid", [(8, 8), (5, 11), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.7, 1.0])
def test_partition_is_that_of_the_definition(backend, grid, threshold):
    x = smooth_tokens(3, grid)
    reduction = graph_merge(x, grid, threshold, backend=backend)
    for image in range(3):
        expected = grid_partition(x[image], grid, threshold)
        assert partition(reduction.assignment[image]) == expected
        assert reduction.counts[image] == len(expected)


def test_a_batch_equals_its_images():
    x = smooth_tokens(4, (6, 9))
    batch = graph_merge(x, (6, 9), 0.6)
    for image in range(4):
        alone = graph_merge(x[image : image + 1], (6, 9), 0.6)
        count = alone.counts.item()
        assert torch.equal(batch.assignment[image], alone.assignment[0])
        assert torch.equal(batch.sizes[image, :count], alone.sizes[0])
        assert not batch.sizes[image, count:].any()


def test_uniform_keeps_as_many_as_the_image_that_merges_least():
    x = smooth_tokens(4, (6, 9))
    ragged = graph_merge(x, (6, 9), 0.6)
    uniform = graph_merge(x, (6, 9), 0.6, batch="uniform")
    most = ragged.counts.max()
    assert torch.equal(uniform.counts, most.expand(4)) and uniform.padding is None
    for image in range(4):
        coarse, fine = partition(ragged.assignment[image]), partition(uniform.assignment[image])
        assert all(any(small <= large for large in coarse) for small in fine)


def test_uniform_merges_the_most_similar_first():
    """Lowering an image's own threshold edge by edge passes through the same partition."""
    x = torch.cat([smooth_tokens(1, (5, 5)), torch.randn(1, 25, 6)])
    uniform = graph_merge(x, (5, 5), 0.5, batch="uniform")
    similarities = torch.cat([s[0].flatten() for s in edge_similarities(x, (5, 5))])
    own = [partition(graph_merge(x[:1], (5, 5), t - 1e-6).assignment[0]) for t in similarities.tolist()]
    assert partition(uniform.assignment[0]) in own


@pytest.mark.parametrize("n_values", [4, 10**6])
def test_uniform_keeps_the_head_of_the_maximum_spanning_forest(n_values):
    """Kruskal's: the most similar edges that join two groups, of equal ones the earlier; 4 values: nearly all equal."""
    grid = (7, 6)
    similarity = [torch.randint(n_values, (3, *shape)) / n_values for shape in ((7, 5), (6, 6))]
    threshold = [torch.tensor([0.6, 0.2, -1.0]).view(3, 1, 1)] * 2
    kept = tuple(s > t for s, t in zip(similarity, threshold, strict=True))
    counts = grid_components(*kept)[1]
    n_merges = 42 - counts.max().item()
    chosen = _strongest_edges(tuple(similarity), kept, n_merges, counts, "auto")
    start, end = (part.tolist() for part in _edge_ends(*grid, "cpu"))
    for image in range(3):
        weight, alive = (torch.cat([part[image].flatten() for part in pair]).tolist() for pair in (similarity, kept))
        forest, taken = networkx.utils.UnionFind(range(42)), set()
        for edge in sorted((e for e in range(len(weight)) if alive[e]), key=lambda e: (-weight[e], e)):
            if forest[start[edge]] != forest[end[edge]]:
                forest.union(start[edge], end[edge])
                taken |= {edge} if len(taken) < n_merges else set()
        assert set(torch.cat([part[image].flatten() for part in chosen]).nonzero().flatten().tolist()) == taken


def test_a_higher_threshold_only_splits():
    x = smooth_tokens(1, (8, 8))
    coarse = partition(graph_merge(x, (8, 8), 0.4).assignment[0])
    fine = partition(graph_merge(x, (8, 8), 0.6).assignment[0])
    assert all(any(small <= large for large in coarse) for small in fine)


def test_similarities_are_cosines():
    x = torch.randn(2, 12, 5)
    right, down = edge_similarities(x, (3, 4))
    tokens = x.view(2, 3, 4, 5)
    torch.testing.assert_close(right, torch.cosine_similarity(tokens[:, :, :-1], tokens[:, :, 1:], dim=-1))
    torch.testing.assert_close(down, torch.cosine_similarity(tokens[:, :-1], tokens[:, 1:], dim=-1))


def test_similarities_of_tokens_that_lie_apart_in_memory():
    x = torch.randn(2, 13, 5)
    for near, apart in zip(
        edge_similarities(x[:, 1:].contiguous(), (3, 4)), edge_similarities(x[:, 1:], (3, 4)), strict=True
    ):
        assert torch.equal(near, apart)


def test_zero_tokens_are_like_nothing():
    x = torch.ones(1, 4, 3)
    x[0, 1] = 0
    right, down = edge_similarities(x, (2, 2))
    assert right.flatten().tolist() == pytest.approx([0, 1]) and down.flatten().tolist() == pytest.approx([1, 0])


@pytest.mark.parametrize("batch", ["ragged", "uniform"])
def test_a_token_that_is_not_finite_stays_alone(batch):
    x = torch.ones(2, 16, 3)
    x[:, 5] = float("nan")
    x[0, 10] = float("inf")
    for threshold in (-1.0, 0.5):
        reduction = graph_merge(x, (4, 4), threshold, batch=batch)
        assert (reduction.assignment == reduction.assignment[:, 5:6]).sum(1).tolist() == [1, 1]
        assert (reduction.assignment[0] == reduction.assignment[0, 10]).sum() == 1


def test_half_precision_tokens_are_compared_in_float32():
    x = smooth_tokens(1, (8, 8)).bfloat16()
    expected = graph_merge(x.float(), (8, 8), 0.6)
    assert torch.equal(graph_merge(x, (8, 8), 0.6).assignment, expected.assignment)


@pytest.mark.parametrize("backend", ON_CPU)
def test_threshold_one_merges_nothing_at_all(backend):
    """Rounding would give equal tokens a cosine above 1."""
    x = torch.randn(1, 1, 33).expand(6, 64, 33)
    assert (graph_merge(x, (8, 8), 1.0, backend=backend).counts == 64).all()


@pytest.mark.parametrize(
    ("arguments", "allowed"),
    [
        ({"threshold": 1.5}, "-1 to 1"),
        ({"threshold": float("nan")}, "-1 to 1"),
        ({"grid": (3, 3)}, "3x3|3×3"),
        ({"batch": "padded"}, "ragged or uniform"),
        ({"backend": "cuda"}, "scipy"),
    ],
)
def test_bad_arguments_are_named(arguments, allowed):
    arguments = {"grid": (2, 4), "threshold": 0.5} | arguments
    with pytest.raises(ValueError, match=allowed):
        graph_merge(torch.randn(1, 8, 3), **arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_partition_of_the_cpu():
    x = smooth_tokens(3, (16, 20))
    for batch in ("ragged", "uniform"):
        cpu = graph_merge(x, (16, 20), 0.6, batch=batch)
        cuda = graph_merge(x.cuda(), (16, 20), 0.6, batch=batch)
        assert torch.equal(cpu.assignment, cuda.assignment.cpu())
