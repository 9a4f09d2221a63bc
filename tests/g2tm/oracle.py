"""Slow references that several tests of merging share."""

import networkx
import torch


def components(right, down):
    """Connected components by a textbook search in Python.

    Args:
        right, down: (B, gh, gw-1) and (B, gh-1, gw), bool.

    Returns:
        As `g2tm.components.grid_components`.
    """
    n_images, gh, gw = len(right), right.shape[1], down.shape[2]
    assignment, lengths = torch.empty(n_images, gh * gw, dtype=torch.long), []
    for image in range(n_images):
        graph = networkx.Graph()
        graph.add_nodes_from(range(gh * gw))
        graph.add_edges_from(
            (row * gw + column, row * gw + column + 1) for row, column in right[image].nonzero().tolist()
        )
        graph.add_edges_from(
            (row * gw + column, (row + 1) * gw + column) for row, column in down[image].nonzero().tolist()
        )
        found = sorted(networkx.connected_components(graph), key=min)
        for number, component in enumerate(found):
            assignment[image, list(component)] = number
        lengths.append(len(found))
    return assignment, torch.tensor(lengths, dtype=torch.long), lengths


def pad(metric, lengths, value=float("nan")):
    """Images of these lengths, cut out of metric, (B, N, D), as (padded metric, padding (B, N), bool).

    The slots without a token hold other numbers, which nothing may depend on.
    """
    padding = torch.arange(metric.shape[1]) >= torch.tensor(lengths)[:, None]
    return torch.where(padding.unsqueeze(-1), torch.full_like(metric, value), metric), padding


def assert_each_is_alone(merge, x, lengths, sizes):
    """A padded batch is its images one by one: assignments, sizes, means, and the padding of the result.

    Args:
        merge: from (x, sizes, padding) to a reduction.
        x: (B, N, D).
        lengths: B numbers of tokens.
        sizes: (B, N) or None.
    """
    padded, padding = pad(x, lengths, 7.0)
    batch = merge(padded, sizes, padding)
    assert torch.equal(batch.counts, torch.tensor(batch.lengths, dtype=torch.long))
    for image, length in enumerate(lengths):
        own = None if sizes is None else sizes[image : image + 1, :length]
        alone = merge(x[image : image + 1, :length], own, None)
        count = alone.lengths[0]
        assert torch.equal(batch.assignment[image, :length], alone.assignment[0])
        assert batch.lengths[image] == count and torch.equal(batch.sizes[image, :count], alone.sizes[0])
        expected = alone.merge(x[image : image + 1, :length])[0]
        torch.testing.assert_close(batch.merge(padded)[image, :count], expected)
        assert not batch.sizes[image, count:].any() and not batch.merge(padded)[image, count:].any()
        if batch.padding is None:
            assert count == batch.width
        else:
            assert batch.padding[image].tolist() == [slot >= count for slot in range(batch.width)]
