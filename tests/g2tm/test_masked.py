"""Common parts of the training forms: straight-through decisions, masked attention, tokens that stay behind a mask."""

import torch

from g2tm import Grouping, above, masked_softmax
from g2tm.masked import MaskedTokens, straight_through
from g2tm.reduction import Chain


def test_decisions_are_hard_forwards_and_soft_backwards():
    values = torch.tensor([0.1, 0.5, 0.50001, 0.9], dtype=torch.double, requires_grad=True)
    threshold = torch.tensor(0.5, dtype=torch.double, requires_grad=True)
    mask = above(values, threshold, 0.2)
    assert mask.tolist() == [0, 0, 1, 1]  # strictly above
    found = torch.autograd.grad(mask.sum(), (values, threshold))
    soft = torch.sigmoid((values - threshold) / 0.2)
    expected = torch.autograd.grad(soft.sum(), (values, threshold))
    torch.testing.assert_close(found, expected)
    assert above(values, 0.5, 0.2).tolist() == [0, 0, 1, 1]
    assert straight_through(torch.tensor(3.0), torch.tensor(2.5)) == 3


def test_masked_tokens_fade_from_attention():
    logits, mask = torch.randn(2, 3, 5, 5).double(), torch.tensor([[1.0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]).double()
    for keeps_self in (False, True):
        found = masked_softmax(logits, mask, 1e-6, keeps_self)
        for image in range(2):
            for query in range(5):
                keys = [float(mask[image, key]) or float(keeps_self and key == query) for key in range(5)]
                weights = (logits[image, :, query] - logits[image, :, query].amax(1, True)).exp() * torch.tensor(keys)
                expected = (weights + 1e-6 / 5) / (weights.sum(1, True) + 1e-6)
                torch.testing.assert_close(found[image, :, query], expected)
    part = masked_softmax(logits[:, :, :2], mask, 1e-6, True)
    torch.testing.assert_close(part, masked_softmax(logits, mask, 1e-6, True)[:, :, :2])


def step_of_four():
    """Four tokens in the order 2, 0, 1, 3; token 1 enters the mean of token 2, and is masked with token 3."""
    group, order = torch.tensor([[1, 0, 0, 3]]), torch.tensor([[2, 0, 1, 3]])
    sizes, mask = torch.tensor([[4.0, 1, 3, 2]]), torch.tensor([[1.0, 1, 0, 0]])
    weights, carried = torch.tensor([[1.0, 3, 1, 2]]), torch.tensor([[1, 0, 0, 1]])
    return MaskedTokens(group, weights, order, sizes, mask, carried)


def test_all_tokens_stay_and_some_become_means():
    step, x = step_of_four(), torch.tensor([[[1.0], [2], [6], [9]]])
    assert step.merge(x).flatten().tolist() == [3, 1, 2, 9]  # (3·2 + 6) / 4 first; token 1 keeps its value
    assert step.unmerge(step.merge(x)).flatten().tolist() == [1, 3, 3, 1]
    assert step.lengths == (4,) and step.width == 4 and step.padding is None
    assert (
        step.counts.tolist() == [4] and step.sizes.tolist() == [[4, 1, 3, 2]] and step.mask.tolist() == [[1, 1, 0, 0]]
    )


def test_it_chains_and_passes_gradients():
    step = step_of_four()
    total = step.then(Grouping.of_length(torch.tensor([[0, 1, 1, 0]]), 2))
    assert isinstance(total, Chain) and total.assignment.tolist() == [[1, 0, 0, 1]]
    x = torch.randn(1, 4, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(step.merge, x, eps=1e-4, atol=1e-3)  # weights are float32
    assert step.merge(x.bfloat16()).dtype == torch.bfloat16


def test_no_images_and_no_tokens():
    for shape in ((0, 4), (2, 0)):
        index, ones = torch.zeros(shape, dtype=torch.long), torch.ones(shape)
        step, x = MaskedTokens(index, ones, index, ones, ones, index), torch.randn(*shape, 3)
        assert step.merge(x).shape == step.unmerge(x).shape == x.shape
