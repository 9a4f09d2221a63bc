"""ClustViT's clusters against loops over tokens: order, padding, empty clusters, skipped images, the way back."""

import torch
from torch import nn

from g2tm import Clusters, Grouping, cluster_labels, clustering_loss
from g2tm.reduction import Chain
from tests.helpers import Reads, Waits

IDS = [[0, 1, 3, 0, 1, 0, 3], [0, 0, 1, 0, 0, 0, 0], [2, 2, 2, 2, 2, 2, 2], [0] * 7, [1, 3, 3, 1, 1, 3, 1]]


def regenerator():
    return nn.Sequential(nn.Linear(6, 3), nn.GELU(), nn.Linear(3, 3)).double()


def reference(x, ids, clusters, slots, skipped):
    """One image, (N, ...) -> (tokens that are there by slot, sizes by slot, assignment)."""
    kept = [token for token, one in enumerate(ids) if one == 0 or skipped]
    there = {slot: x[token] for slot, token in enumerate(kept)}
    sizes, assignment = dict.fromkeys(there, 1), {token: slot for slot, token in enumerate(kept)}
    for one in range(1, clusters + 1) if not skipped else ():
        members = [token for token, own in enumerate(ids) if own == one]
        there[slots + one - 1] = x[members].mean(0) if members else torch.zeros_like(x[0])
        sizes[slots + one - 1] = len(members)
        assignment |= dict.fromkeys(members, slots + one - 1)
    return there, sizes, [assignment[token] for token in range(len(ids))]


def test_it_is_what_the_definition_says():
    """Every image decides for itself, or all of them merge, or none."""
    expand, x = regenerator(), torch.randn(5, 7, 3).double()
    for images in ([0], [0, 1, 4], [0, 1, 2, 3, 4], [2, 3], [4]):
        ids, own = torch.tensor([IDS[image] for image in images]), x[images]
        for rule in (None, False, True):
            skipped = [len(set(row)) == 1 for row in ids.tolist()] if rule is None else [rule] * len(images)
            step = Clusters(own, ids, 3, expand, None if rule is None else torch.tensor(skipped))
            slots = max(sum(one == 0 or skip for one in row) for row, skip in zip(ids.tolist(), skipped, strict=True))
            assert step.width == slots + (0 if all(skipped) else 3)
            y = torch.randn(len(images), step.width, 3).double()
            merged, back = step.merge(own), step.unmerge(y)
            for image, (row, skip) in enumerate(zip(ids.tolist(), skipped, strict=True)):
                there, sizes, assignment = reference(own[image], row, 3, slots, skip)
                assert step.assignment[image].tolist() == assignment
                assert step.lengths[image] == step.counts[image] == len(there)
                for slot in range(step.width):
                    assert step.sizes[image, slot] == sizes.get(slot, 0)
                    assert (slot in there) == (step.padding is None or not step.padding[image, slot])
                    torch.testing.assert_close(merged[image, slot], there.get(slot, torch.zeros(3).double()))
                for token, slot in enumerate(assignment):
                    pair = torch.cat([own[image, token], y[image, slot]])
                    own_row = row[token] == 0 or skip
                    torch.testing.assert_close(back[image, token], y[image, slot] if own_row else expand(pair))


def test_it_is_a_grouping_with_a_way_back_of_its_own():
    expand, x, ids = regenerator(), torch.randn(2, 7, 3).double(), torch.tensor(IDS[:2])
    step = Clusters(x, ids, 3, expand)
    assert isinstance(step, Grouping)
    total = step.then(Grouping.of_length(torch.zeros(2, step.width, dtype=torch.long), 1))
    assert isinstance(total, Chain) and torch.equal(total.assignment, torch.zeros(2, 7, dtype=torch.long))
    wide = step.widened(12)
    assert wide.width == 12 and wide.lengths == step.lengths and wide.padding[:, step.width :].all()
    assert torch.equal(wide.padding[:, : step.width], step.padding)
    assert torch.equal(wide.merge(x)[:, : step.width], step.merge(x))
    y = torch.randn(2, 12, 3).double()
    assert torch.equal(wide.unmerge(y), step.unmerge(y[:, : step.width]))
    assert step.widened(1).width == step.width


def test_gradients_reach_tokens_and_regenerator():
    expand, ids = regenerator(), torch.tensor(IDS[:2])
    x = torch.randn(2, 7, 3, dtype=torch.double, requires_grad=True)
    step = Clusters(x, ids, 3, expand, logits=x @ torch.randn(3, 4).double())

    def there_and_back(x):
        own = Clusters(x, ids, 3, expand)
        return own.unmerge(own.merge(x).sin())

    assert torch.autograd.gradcheck(there_and_back, x)
    step.unmerge(step.merge(x)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in expand.parameters()) and x.grad.abs().sum() > 0
    plain = step.detached()
    assert not plain.logits.requires_grad and not plain.x.requires_grad and not plain.merge(x.detach()).requires_grad


def test_it_waits_once():
    expand, x = regenerator(), torch.randn(5, 7, 3).double()
    with Waits() as waits, Reads() as reads:
        step = Clusters(x, torch.tensor(IDS), 3, expand)
        step.unmerge(step.merge(x))
        assert step.padding is not None and step.sizes is not None
    assert (reads.count, waits.count) == (1, 0)


def test_few_tokens_and_no_images():
    expand = regenerator()
    for n_images, n_tokens in ((0, 5), (2, 0), (0, 0), (2, 1), (2, 2)):
        x, ids = torch.randn(n_images, n_tokens, 3).double(), torch.arange(n_tokens).repeat(n_images, 1)
        step = Clusters(x, ids, 3, expand)
        assert step.unmerge(step.merge(x)).shape == x.shape
        assert step.width == (4 if n_tokens == 2 else n_tokens)


def test_mixed_precision_comes_back_as_the_regenerator_gives_it():
    expand, x = regenerator().float(), torch.randn(2, 7, 3)
    step = Clusters(x, torch.tensor(IDS[:2]), 3, expand)
    with torch.autocast("cpu", torch.bfloat16):
        assert step.unmerge(step.merge(x)).dtype == torch.bfloat16
    assert step.merge(x.bfloat16()).dtype == torch.bfloat16


def test_labels_are_ranks_of_the_labels_with_most_patches_alone():
    labels = torch.full((1, 4, 7), 255)
    labels[0, :2, :2], labels[0, :2, 2:4], labels[0, :2, 4:6] = 7, 7, 4
    labels[0, 2:, :2], labels[0, 2:, 2:4] = 2, 4
    labels[0, 3, 3] = 9  # a mixed patch
    assert cluster_labels(labels, (2, 2), 3).tolist() == [[[1, 1, 3, 0], [2, 0, 0, 0]]]
    assert cluster_labels(labels, (2, 2), 1).tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]]]
    assert cluster_labels(labels, (4, 2), 3).tolist() == [[[0, 0, 0, 0]]]
    assert cluster_labels(labels[:0], (2, 2), 3).shape == (0, 2, 4)


def test_the_loss_is_the_mean_over_all_patches():
    logits, ids = torch.randn(2, 6, 4), torch.randint(4, (2, 2, 3))
    expected = -logits.log_softmax(2).gather(2, ids.view(2, 6, 1)).mean()
    torch.testing.assert_close(clustering_loss(logits, ids), expected)
