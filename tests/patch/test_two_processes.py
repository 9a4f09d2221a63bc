"""Two processes train a patched model together: they share the gradients of every parameter, learned parts included."""

import multiprocessing

import pytest
import timm
import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

import patch

SIZE = {"img_size": 64, "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 5}
METHODS = {"keymatch": {"tokens": 0.5}, "graph": {"layers": [2], "threshold": 0.3}, "ltmp": {"learned": True}}


class Objective(nn.Module):
    """A model with its loss, that of the method included."""

    def __init__(self, method):
        super().__init__()
        torch.manual_seed(0)
        self.vit = timm.create_model("vit_tiny_patch16_224", **SIZE)
        patch.apply(patch.add_modules(self.vit, method), method, **METHODS[method])

    def forward(self, images):
        return self.vit(images).square().mean() + patch.loss(self.vit)


def images_of(rank):
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(rank))


def gradients(objective, rank):
    objective(images_of(rank)).backward()
    return {name.removeprefix("module."): p.grad for name, p in objective.named_parameters()}


def work(rank, folder):
    """What one process does."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {
        (method, unused): gradients(DistributedDataParallel(Objective(method), find_unused_parameters=unused), rank)
        for method in METHODS
        for unused in (False, True)
    }
    torch.save(found, f"{folder}/{rank}.pt")
    distributed.barrier()


@pytest.mark.slow
def test_two_processes_share_all_gradients(tmp_path):
    context = multiprocessing.get_context("forkserver")  # no process may be forked after its autograd has run
    children = [context.Process(target=work, args=(rank, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (method, unused), shared in first.items():
        assert all(
            grad is not None and torch.equal(grad, second[method, unused][name]) for name, grad in shared.items()
        )
        if method != "ltmp":  # whose training draws
            alone = [gradients(Objective(method), rank) for rank in range(2)]
            mean = {name: (alone[0][name] + alone[1][name]) / 2 for name in shared}
            torch.testing.assert_close(shared, mean, atol=1e-6, rtol=1e-4)
