"""Connected components of an edge list, over a whole batch at once.

Every backend names each node's root: the smallest index in its component.
"""

import networkx
import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree


def component_roots(start, end, n_nodes, backend="auto"):
    """Root of every node.

    Args:
        start, end: (E,), int64, the nodes at the two ends of every edge.
        n_nodes: number of nodes; all images of a batch lie in one graph.
        backend: "scipy" (compiled, CPU), "torch" (label propagation, any device), "networkx" (slow, for
            comparison), or "auto": scipy on the CPU, torch elsewhere.

    Returns:
        (n_nodes,), int64: the smallest index in each node's component.

    Raises:
        ValueError: unknown backend.
    """
    check_backend(backend)
    if backend == "auto":
        backend = "scipy" if start.device.type == "cpu" else "torch"
    return BACKENDS[backend](start, end, n_nodes)


def _scipy_roots(start, end, n_nodes):
    """scipy's compiled search; it works on the CPU."""
    graph = _sparse_graph(start, end, np.ones(len(start), dtype=np.int8), n_nodes)
    n_components, labels = connected_components(graph, directed=False)
    roots = np.empty(n_components, dtype=np.int64)
    roots[labels[::-1]] = np.arange(n_nodes)[::-1]  # the last assignment wins: the smallest index
    return torch.from_numpy(roots[labels]).to(start.device)


def _networkx_roots(start, end, n_nodes):
    """The oracle: a textbook search in Python."""
    graph = networkx.Graph()
    graph.add_nodes_from(range(n_nodes))
    graph.add_edges_from(zip(start.tolist(), end.tolist(), strict=True))
    roots = torch.empty(n_nodes, dtype=torch.long)
    for component in networkx.connected_components(graph):
        roots[list(component)] = min(component)
    return roots.to(start.device)


def _torch_roots(start, end, n_nodes):
    """Label propagation with pointer jumping: a root hooks onto the smallest root across its edges, then all
    chains are shortened, until nothing changes."""
    roots = torch.arange(n_nodes, device=start.device)
    while True:
        low, high = torch.aminmax(torch.stack([roots[start], roots[end]]), dim=0)
        hooked = roots.scatter_reduce(0, high, low, "amin")
        jumped = hooked[hooked]
        jumped = jumped[jumped]
        if torch.equal(jumped, roots):
            return roots
        roots = jumped


BACKENDS = {"scipy": _scipy_roots, "torch": _torch_roots, "networkx": _networkx_roots}


def check_backend(backend):
    """Raise a ValueError for an unknown backend."""
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"unknown backend {backend!r}: choose auto, {', '.join(BACKENDS)}")


def spanning_forest(start, end, weight, n_nodes):
    """Edges of a maximum spanning forest, heaviest first; of equal weights the earlier edge is taken.

    Args:
        start, end, weight: (E,); no pair of nodes twice.
        n_nodes: number of nodes.

    Returns:
        (F,), int64: indices of the chosen edges.
    """
    order = torch.argsort(weight, descending=True, stable=True)
    # Ranks as lengths: all different, none of them 0, which a sparse graph would take for a missing edge.
    rank = np.arange(1, len(order) + 1, dtype=np.float64)
    forest = minimum_spanning_tree(_sparse_graph(start[order], end[order], rank, n_nodes))
    return order[torch.from_numpy(np.sort(forest.data).astype(np.int64) - 1).to(order.device)]


def _sparse_graph(start, end, values, n_nodes):
    return coo_array((values, (start.cpu().numpy(), end.cpu().numpy())), shape=(n_nodes, n_nodes)).tocsr()
