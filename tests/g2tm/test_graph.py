"""Graph merging: components, thresholds, batches, errors."""

import networkx
import pytest
import torch

from g2tm import edge_similarities, graph_merge
from g2tm.components import BACKENDS, component_roots, spanning_forest


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


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", [(8, 8), (5, 11), (1, 7), (7, 1), (1, 1)])
@pytest.mark.parametrize("threshold", [-1.0, 0.3, 0.7, 1.0])
def test_partition_is_that_of_the_definition(backend, grid, threshold):
    x = smooth_tokens(3, grid)
    reduction = graph_merge(x, grid, threshold, backend=backend)
    for image in range(3):
        expected = grid_partition(x[image], grid, threshold)
        assert partition(reduction.assignment[image]) == expected
        assert reduction.counts[image] == len(expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backends_name_the_smallest_index(backend):
    start, end = torch.randint(60, (2, 45))
    graph = networkx.Graph(zip(start.tolist(), end.tolist(), strict=True))
    graph.add_nodes_from(range(60))
    roots = component_roots(start, end, 60, backend)
    for component in networkx.connected_components(graph):
        assert set(roots[list(component)].tolist()) == {min(component)}


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_long_chain_is_one_component(backend):
    order = torch.randperm(500)
    assert not component_roots(order[:-1], order[1:], 500, backend).any()


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


def test_spanning_forest_is_networkx():
    pairs = torch.combinations(torch.arange(30))
    start, end = pairs[torch.randperm(len(pairs))[:60]].T
    weight = torch.rand(60)
    graph = networkx.Graph()
    graph.add_weighted_edges_from(zip(start.tolist(), end.tolist(), weight.tolist(), strict=True))
    forest = spanning_forest(start, end, weight, 30)
    expected = networkx.maximum_spanning_tree(graph).size(weight="weight")
    assert weight[forest].sum().item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(weight[forest], weight[forest].sort(descending=True).values)


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


def test_half_precision_tokens_are_compared_in_float32():
    x = smooth_tokens(1, (8, 8)).bfloat16()
    expected = graph_merge(x.float(), (8, 8), 0.6)
    assert torch.equal(graph_merge(x, (8, 8), 0.6).assignment, expected.assignment)


@pytest.mark.parametrize("backend", BACKENDS)
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
