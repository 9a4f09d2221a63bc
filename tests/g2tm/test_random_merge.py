"""The random baseline: exact numbers, order, what a seed decides, one graph."""

import pytest
import torch

from g2tm import random_merge


def test_exactly_so_many_tokens_stay_in_their_old_order():
    for n_tokens in (1, 2, 7, 64):
        x = torch.randn(3, n_tokens, 4)
        for tokens in range(1, n_tokens + 1):
            step = random_merge(x, tokens=tokens, seed=tokens)
            assert step.lengths == (tokens,) * 3 and step.padding is None and step.counts.tolist() == [tokens] * 3
            groups = step.assignment[0].tolist()
            assert torch.equal(step.assignment, step.assignment[:1].expand(3, -1)) and set(groups) == set(range(tokens))
            assert step.sizes.sum(1).tolist() == [n_tokens] * 3
    assert random_merge(x, tokens=64, seed=0).assignment[0].tolist() == list(range(64))


def survivors(step, n_tokens):
    """Positions that every group may have survived at: ascending, if survivors are in their old order."""
    groups = step.assignment[0].tolist()
    return [[i for i in range(n_tokens) if groups[i] == group] for group in range(step.width)]


def test_survivors_are_in_their_old_order():
    for seed in range(20):
        last = -1
        for members in survivors(random_merge(torch.randn(1, 30, 2), tokens=20, seed=seed), 30):
            after = [member for member in members if member > last]
            assert after  # a choice of one token per group, ascending
            last = after[0]


def test_a_seed_decides():
    x = torch.randn(2, 50, 3)
    one, same, other = (random_merge(x, tokens=20, seed=seed).assignment for seed in (5, 5, 6))
    assert torch.equal(one, same) and not torch.equal(one, other)
    for seed in (-1, 0, 2**31, 2**40 + 3):
        assert random_merge(x, tokens=20, seed=seed).lengths == (20, 20)


def test_the_choice_never_changes():
    """On no machine and with no version: results that were written down stay comparable."""
    found = random_merge(torch.randn(1, 12, 2), tokens=4, seed=1).assignment[0].tolist()
    assert found == [3, 0, 0, 1, 2, 3, 1, 2, 2, 2, 1, 3]


def test_every_token_stays_about_as_often_and_targets_spread():
    x, seeds = torch.zeros(1, 40, 1), range(2000)
    stays, pairs = torch.zeros(40), torch.zeros(20)
    for seed in seeds:
        step = random_merge(x, tokens=20, seed=seed)
        pairs += step.sizes[0]
        alone = step.sizes[0][step.assignment[0]] == 1
        stays += alone
    # A token is alone if it stays (1/2) and none of 20 goes to it (0.95^20): 0.179 of 2000, give or take 17.
    assert ((stays / 2000 - 0.179).abs() < 0.045).all()
    assert ((pairs / 2000 - 2).abs() < 0.15).all()


def test_sizes_weigh():
    x, sizes = torch.randn(2, 9, 3), torch.randint(1, 5, (2, 9)).float()
    step = random_merge(x, tokens=1, seed=3, sizes=sizes)
    torch.testing.assert_close(step.merge(x)[:, 0], (x * sizes.unsqueeze(2)).sum(1) / sizes.sum(1, keepdim=True))


def test_no_image():
    x = torch.randn(0, 9, 3)
    step = random_merge(x, tokens=4, seed=3)
    assert step.unmerge(step.merge(x)).shape == x.shape and step.lengths == ()


def test_it_is_one_graph():
    x = torch.randn(2, 30, 3)
    compiled = torch.compile(lambda x: random_merge(x, tokens=9, seed=4).merge(x), fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), random_merge(x, tokens=9, seed=4).merge(x))


def test_other_numbers_of_tokens_are_refused():
    for tokens in (0, 10, 0.5, True):
        with pytest.raises(ValueError, match="1 to 9"):
            random_merge(torch.randn(1, 9, 3), tokens=tokens, seed=0)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_assignment_of_the_cpu():
    x = torch.randn(2, 300, 3)
    expected = random_merge(x, tokens=90, seed=4).assignment
    assert torch.equal(random_merge(x.cuda(), tokens=90, seed=4).assignment.cpu(), expected)
