"""Graph merging: components, thresholds, batches, errors."""

import networkx
import pytest
import torch

from g2tm import edge_similarities, graph_merge
from g2tm.components import BACKENDS, grid_components, strongest_components
from tests.g2tm.oracle import assert_each_is_alone

GRIDS = [(8, 8), (5, 11), (1, 7), (7, 1), (1, 1)]
ON_CPU = [backend for backend in BACKENDS if backend != "triton"]


def partition(assignment):
    """The groups of one image as a set of sets: independent of their labels."""
    groups = {}
    for token, group in enumerate(assignment.tolist()):
        groups.setdefault(group, set()).add(token)
    return {frozenset(group) for group in groups.values()}


def grid_partition(x, grid, threshold):
    """The definition, word for word: components of the 4-neighbor graph of similar patches."""
    graph = networkx.grid_2d_graph(*grid)
    tokens = torch.nn.functional.normalize(x.float(), dim=-1).view(*grid, -1)
    for a, b in list(graph.edges):
        if tokens[a] @ tokens[b] <= threshold:
            graph.remove_edge(a, b)
    return {frozenset(r * grid[1] + c for r, c in part) for part in networkx.connected_components(graph)}


def smooth_tokens(n_images, grid, dim=6):
    """Tokens whose neighbors are often similar."""
    noise = torch.randn(n_images, dim, *grid)
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1).flatten(2).transpose(1, 2)


def edge_list(right, down):
    """(strength, one end, other end) of every edge of one image, in the order in which equal ones are taken."""
    index = torch.arange(right.shape[0] * down.shape[1]).view(right.shape[0], down.shape[1])
    parts = [(right, index[:, :-1], index[:, 1:]), (down, index[:-1], index[1:])]
    return [edge for part in parts for edge in zip(*(side.flatten().tolist() for side in part), strict=True)]


def kruskal(right, down, n_groups):
    """Partition of one image: the strongest edges that join two groups, until so many are left."""
    groups = networkx.utils.UnionFind(range(right.shape[0] * down.shape[1]))
    edges = sorted(edge_list(right, down), key=lambda edge: -edge[0] if edge[0] == edge[0] else 2)
    joins = right.shape[0] * down.shape[1] - n_groups
    for _, one, other in edges:
        if joins and groups[one] != groups[other]:
            groups.union(one, other)
            joins -= 1
    return {frozenset(group) for group in groups.to_sets()}


def test_partition_is_that_of_the_definition():
    for grid in GRIDS:
        x = smooth_tokens(3, grid)
        for threshold in (-1.0, 0.3, 0.7, 1.0):
            expected = [grid_partition(image, grid, threshold) for image in x]
            for backend in ON_CPU:
                reduction = graph_merge(x, grid, threshold, backend=backend)
                assert [partition(image) for image in reduction.assignment] == expected
                assert reduction.counts.tolist() == list(reduction.lengths) == [len(groups) for groups in expected]


def test_a_budget_leaves_exactly_so_many_tokens():
    """Those of Kruskal's algorithm."""
    for grid in GRIDS:
        x, n_patches = smooth_tokens(3, grid), grid[0] * grid[1]
        right, down = edge_similarities(x, grid)
        for tokens in sorted({1, n_patches, *torch.randint(1, n_patches + 1, (5,)).tolist()}):
            expected = [kruskal(right[image], down[image], tokens) for image in range(3)]
            for backend in ON_CPU if tokens % 5 == 1 else ["auto"]:
                reduction = graph_merge(x, grid, None, tokens=tokens, backend=backend)
                assert [partition(image) for image in reduction.assignment] == expected
                assert reduction.counts.tolist() == list(reduction.lengths) == [tokens] * 3
                assert reduction.padding is None and (reduction.sizes > 0).all()


def test_a_budget_takes_equal_edges_in_order():
    """4 values: nearly all equal; NaN comes last."""
    for n_values in (1, 4, 10**6):
        right, down = (torch.randint(n_values, (3, *shape)) / n_values for shape in ((7, 5), (6, 6)))
        right[0, 3, 2] = down[1, 2] = float("nan")
        for tokens in range(1, 43):
            found = [strongest_components(right, down, tokens, backend) for backend in ("opencv", "torch")]
            assert torch.equal(*found)
            for image in range(3):
                assert partition(found[0][image]) == kruskal(right[image], down[image], tokens)


def test_groups_are_numbered_by_their_first_patch():
    reduction = graph_merge(smooth_tokens(3, (6, 9)), (6, 9), None, tokens=20)
    for image in reduction.assignment.tolist():
        assert list(dict.fromkeys(image)) == list(range(20))


def test_no_image_gives_no_image():
    x = torch.randn(0, 12, 5)
    for backend in ("auto", *ON_CPU):
        for arguments in ({"threshold": 0.5}, {"threshold": 0.5, "batch": "uniform"}, {"threshold": None, "tokens": 4}):
            reduction = graph_merge(x, (3, 4), **arguments, backend=backend)
            assert reduction.unmerge(reduction.merge(x)).shape == x.shape and reduction.lengths == ()
        assert grid_components(*(similarity > 0 for similarity in edge_similarities(x, (3, 4))), backend)[2] == []


def test_tokens_without_a_direction_or_a_difference():
    for x in (torch.zeros(2, 20, 3), torch.ones(2, 20, 3), torch.full((2, 20, 3), float("nan"))):
        for arguments in ({"threshold": 0.5}, {"threshold": 0.5, "batch": "uniform"}, {"threshold": None, "tokens": 7}):
            reduction = graph_merge(x, (4, 5), **arguments)
            assert (reduction.sizes.sum(1) == 20).all()
    assert graph_merge(torch.zeros(1, 20, 3), (4, 5), 0.0).lengths == (20,)
    assert graph_merge(torch.ones(1, 20, 3), (4, 5), 0.5).lengths == (1,)


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


def test_uniform_is_the_budget_of_the_image_that_merges_least():
    x = smooth_tokens(4, (6, 9))
    uniform = graph_merge(x, (6, 9), 0.6, batch="uniform")
    budget = graph_merge(x, (6, 9), None, tokens=max(graph_merge(x, (6, 9), 0.6).lengths))
    assert torch.equal(uniform.assignment, budget.assignment)


def cut(x, grid, lengths):
    """Rows of the images: (the tokens of whole rows, their padding)."""
    padding = torch.arange(x.shape[1]) >= torch.tensor(lengths)[:, None]
    return torch.where(padding.unsqueeze(-1), x[:, :1], x), padding


def test_padding_joins_nothing_and_is_no_group():
    """It holds the first token again, which is like some of its neighbors."""
    x, lengths = smooth_tokens(4, (6, 9)), [54, 45, 50, 7]
    padded, padding = cut(x, (6, 9), lengths)
    for sizes in (None, torch.randint(0, 4, (4, 54)).float()):
        for backend in ("auto", "torch"):
            batch = graph_merge(padded, (6, 9), 0.6, sizes=sizes, padding=padding, backend=backend)
            assert torch.equal(batch.counts, torch.tensor(batch.lengths))
            assert torch.equal(batch.padding, torch.arange(batch.width) >= batch.counts[:, None])
            for image, length in enumerate(lengths):
                edges = [s[image] > 0.6 for s in edge_similarities(x, (6, 9))]
                graph = networkx.Graph([(i, i) for i in range(length)])
                pairs = edge_list(*edges)
                graph.add_edges_from((one, other) for joined, one, other in pairs if joined and other < length)
                expected = {frozenset(part) for part in networkx.connected_components(graph)}
                assert partition(batch.assignment[image, :length]) == expected and batch.lengths[image] == len(expected)
                own = torch.ones(length) if sizes is None else sizes[image, :length]
                assert batch.sizes[image].sum() == own.sum()


def test_padding_of_whole_rows_is_a_smaller_grid():
    x, sizes = smooth_tokens(2, (6, 9)), torch.randint(1, 4, (2, 54)).float()

    def merge(x, sizes, padding):
        return graph_merge(x, (x.shape[1] // 9, 9), 0.6, sizes=sizes, padding=padding)

    assert_each_is_alone(merge, x, [54, 36], sizes)
    assert_each_is_alone(merge, x, [45, 9], None)


def test_uniform_with_padding_merges_as_often_in_every_image():
    x, lengths = smooth_tokens(3, (6, 9)), [54, 45, 36]
    padded, padding = cut(x, (6, 9), lengths)
    ragged = graph_merge(padded, (6, 9), 0.6, padding=padding)
    uniform = graph_merge(padded, (6, 9), 0.6, padding=padding, batch="uniform")
    fewest = min(length - count for length, count in zip(lengths, ragged.lengths, strict=True))
    assert uniform.lengths == tuple(length - fewest for length in lengths)
    for image, length in enumerate(lengths):
        coarse, fine = (partition(step.assignment[image, :length]) for step in (ragged, uniform))
        assert all(any(small <= large for large in coarse) for small in fine)


def test_a_budget_takes_no_padding():
    with pytest.raises(ValueError, match="no padding"):
        graph_merge(torch.randn(1, 8, 3), (2, 4), None, tokens=4, padding=torch.zeros(1, 8, dtype=torch.bool))


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


def test_threshold_one_merges_nothing_at_all():
    """Rounding would give equal tokens a cosine above 1."""
    x = torch.randn(1, 1, 33).expand(6, 64, 33)
    for backend in ON_CPU:
        assert (graph_merge(x, (8, 8), 1.0, backend=backend).counts == 64).all()


def test_similarities_are_those_of_the_backend(monkeypatch):
    """NumPy's serve the CPU, torch's any device."""

    def refuse(*_):
        raise AssertionError

    x = smooth_tokens(2, (6, 9))
    expected = graph_merge(x, (6, 9), 0.6).assignment
    monkeypatch.setattr("g2tm.graph.row_dot", refuse)
    assert torch.equal(graph_merge(x, (6, 9), 0.6, backend="torch").assignment, expected)
    for backend in ("opencv", "auto"):
        with pytest.raises(AssertionError):
            graph_merge(x, (6, 9), 0.6, backend=backend)


def test_bad_arguments_are_named():
    for arguments, allowed in (
        ({"threshold": 1.5}, "-1 to 1"),
        ({"threshold": float("nan")}, "-1 to 1"),
        ({"threshold": None}, "-1 to 1"),
        ({"tokens": 0}, "1 to 8"),
        ({"tokens": 9}, "1 to 8"),
        ({"tokens": 0.5}, "1 to 8"),
        ({"tokens": True}, "1 to 8"),
        ({"grid": (3, 3)}, "3×3"),
        ({"grid": (-2, -4)}, "at least one row"),
        ({"batch": "padded"}, "ragged or uniform"),
        ({"backend": "scipy"}, "auto, opencv, torch or triton$"),
    ):
        with pytest.raises(ValueError, match=allowed):
            graph_merge(torch.randn(1, 8, 3), **({"grid": (2, 4), "threshold": 0.5} | arguments))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_partition_of_the_cpu():
    x = smooth_tokens(3, (16, 20))
    for arguments in ({"batch": "ragged"}, {"batch": "uniform"}, {"tokens": 1}, {"tokens": 123}, {"tokens": 320}):
        cpu = graph_merge(x, (16, 20), 0.6, **arguments)
        for backend in ("auto", "torch", "triton", "opencv"):
            cuda = graph_merge(x.cuda(), (16, 20), 0.6, **arguments, backend=backend)
            assert cuda.assignment.is_cuda and torch.equal(cpu.assignment, cuda.assignment.cpu())
    assert graph_merge(x[:0].cuda(), (16, 20), 0.6).lengths == ()
