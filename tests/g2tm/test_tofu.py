"""ToFu: the published steps, both forms of the norm correction, composition, parity, padding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from g2tm import bipartite, prunes, tofu
from g2tm.reduction import Chain, Grouping, Reduction
from tests.g2tm.oracle import assert_each_is_alone

DATA = Path(__file__).parents[1] / "data"
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def vectors():
    return load_file(DATA / "opentome_a.safetensors")


def test_one_step_is_the_published_one(vectors):
    """The vectors are of sequences with CLS in front, which merges with none."""
    for name, r in (("n65", 8), ("n65", 100), ("n145", 40)):
        case = f"tofu.{name}.r{r}"
        metric, x, sizes = (vectors[f"{name}.{what}"][:, 1:] for what in ("metric", "x", "size"))
        for prune, values in ((True, "pruned"), (False, "merged")):
            step, expected = tofu(metric, r=r, prune=prune, sizes=sizes[..., 0]), vectors[f"{case}.{values}"][:, 1:]
            assert isinstance(step, Reduction) and step.padding is None
            assert torch.equal((1 + step.assignment).int(), vectors[f"{case}.assignment"][:, 1:])
            assert not vectors[f"{case}.assignment"][:, 0].any()
            torch.testing.assert_close(step.sizes, vectors[f"{case}.size"][:, 1:, 0], **CLOSE)
            torch.testing.assert_close(step.merge(x), expected, **CLOSE)
            wide = step.widened(step.width + 3)
            torch.testing.assert_close(wide.merge(x), torch.nn.functional.pad(expected, (0, 0, 0, 3)), **CLOSE)


def test_the_first_half_of_the_blocks_prunes():
    assert [layer for layer in range(1, 13) if prunes(layer, 12)] == [1, 2, 3, 4, 5, 6, 7]
    assert [layer for layer in range(1, 6) if prunes(layer, 5)] == [1, 2, 3]
    assert prunes(1, 1)


def by_definition(x, assignment, form, prefix):
    """Every group's value, token by token: the destination of a group is its token at an odd position, of the whole
    sequence, in which `prefix` tokens stand in front of x."""
    merged = []
    for group in range(int(assignment.max()) + 1):
        members = (assignment == group).nonzero().flatten().tolist()
        destination = next((i for i in members if (prefix + i) % 2 == 1), members[0])
        if form == "pruned":
            merged.append(x[destination])
            continue
        mean = x[members].mean(0)
        below = mean.norm() if form == "paper" else x[destination].norm()
        merged.append(mean * x[members].norm(dim=-1).max() / below)
    return torch.stack(merged)


def test_values_are_those_of_the_definition_for_any_prefix():
    for prefix in (0, 1, 2, 5):
        for form in ("pruned", "code", "paper"):
            metric, x = torch.randn(2, 22, 4), torch.randn(2, 22, 6)
            variant, odd_first = "code" if form == "pruned" else form, prefix % 2 == 1
            step = tofu(metric, r=7, prune=form == "pruned", odd_first=odd_first, variant=variant)
            assert torch.equal(step.assignment, bipartite(metric, r=7, odd_first=odd_first).assignment)
            for image in range(2):
                expected = by_definition(x[image], step.assignment[image], form, prefix)
                torch.testing.assert_close(step.merge(x)[image], expected)


def test_equally_similar_tokens_go_to_the_lower_index():
    for prune in (True, False):
        assert tofu(torch.ones(1, 8, 3), r=2, prune=prune).assignment.tolist() == [[2, 2, 3, 2, 4, 0, 5, 1]]


def test_hardly_a_token_and_no_image():
    for shape in ((2, 0, 4), (2, 1, 4), (2, 2, 4), (0, 5, 4)):
        for prune in (True, False):
            for odd_first in (True, False):
                x = torch.randn(shape)
                step = tofu(x, r=3, prune=prune, odd_first=odd_first)
                assert step.unmerge(step.merge(x)).shape == x.shape
                assert step.lengths == (shape[1] - shape[1] // 2,) * shape[0]


def test_the_paper_gives_the_largest_norm_back():
    x = torch.randn(1, 20, 5)
    step = tofu(torch.randn(1, 20, 4), r=9, prune=False, variant="paper")
    largest = torch.zeros(1, step.width).scatter_reduce(1, step.assignment, x.norm(dim=-1), "amax")
    torch.testing.assert_close(step.merge(x).norm(dim=-1), largest)


def test_steps_seen_as_one_are_the_steps_one_by_one():
    for modes in ((True, True, True), (True, False, True), (False, False), (True, True, False, False)):
        for odd_first in (False, True):
            x, total, sizes = torch.randn(2, 40, 6), None, None
            stepwise = x
            for prune in modes:
                metric = torch.randn(2, stepwise.shape[1], 4)
                step = tofu(metric, r=6, prune=prune, sizes=sizes, odd_first=odd_first)
                stepwise, sizes = step.merge(stepwise), step.sizes
                total = step if total is None else total.then(step)
            assert isinstance(total, Grouping if all(modes) else Chain)
            torch.testing.assert_close(total.merge(x), stepwise)
            torch.testing.assert_close(total.sizes, sizes)
            assert torch.equal(total.sizes.sum(1), torch.full((2,), 40.0))
            rows = total.assignment.unsqueeze(-1).expand(-1, -1, 6)
            assert torch.equal(total.unmerge(stepwise), stepwise.gather(1, rows))


def test_a_padded_batch_is_its_images():
    metric, sizes = torch.randn(4, 20, 4), torch.randint(0, 5, (4, 20)).float()
    for prune, variant in ((True, "code"), (False, "code"), (False, "paper")):
        for odd_first in (True, False):
            for own in (None, sizes):
                given = {"prune": prune, "variant": variant, "odd_first": odd_first}
                assert_each_is_alone(
                    lambda x, sizes, padding, given=given: tofu(x, r=6, sizes=sizes, padding=padding, **given),
                    metric,
                    [20, 13, 1, 4],
                    own,
                )


def test_it_is_differentiable_and_zero_tokens_are_harmless():
    metric, x = torch.randn(1, 12, 4), torch.randn(1, 12, 3, dtype=torch.double, requires_grad=True)
    for prune, variant in ((True, "code"), (False, "code"), (False, "paper")):
        step = tofu(metric, r=4, prune=prune, variant=variant)
        assert torch.autograd.gradcheck(step.merge, x)
        zeros = torch.zeros(1, 12, 3, requires_grad=True)
        merged = step.merge(zeros)
        merged.sum().backward()
        assert not merged.any() and zeros.grad.isfinite().all()
    x = torch.randn(1, 12, 3)
    x[:, ::2] = 0  # every destination
    assert step.merge(x).isfinite().all() and tofu(metric, r=4, prune=False).merge(x).isfinite().all()


def test_the_dtype_is_that_of_the_tokens():
    for prune in (True, False):
        step, x = tofu(torch.randn(2, 20, 4).bfloat16(), r=5, prune=prune), torch.randn(2, 20, 6).bfloat16()
        assert step.merge(x).dtype == torch.bfloat16
        assert torch.equal(step.merge(x), step.merge(x.float()).bfloat16())


def test_wrong_values_are_refused():
    with pytest.raises(ValueError, match="code or paper"):
        tofu(torch.randn(1, 9, 4), r=2, prune=False, variant="mlerp")
    with pytest.raises(ValueError, match="r -1"):
        tofu(torch.randn(1, 9, 4), r=-1, prune=True)
