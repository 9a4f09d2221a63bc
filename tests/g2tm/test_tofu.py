"""ToFu: the published steps, both forms of the norm correction, composition, prefix tokens, padding."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from g2tm import prunes, tofu
from g2tm.reduction import Chain, Grouping, Reduction

DATA = Path(__file__).parents[1] / "data"
CLOSE = {"atol": 1e-5, "rtol": 0}


@pytest.fixture(scope="module")
def vectors():
    return load_file(DATA / "opentome_a.safetensors")


def test_one_step_is_the_published_one(vectors):
    for name, r in (("n65", 8), ("n65", 100), ("n145", 40)):
        case, sizes = f"tofu.{name}.r{r}", vectors[f"{name}.size"][..., 0]
        for prune, values in ((True, "pruned"), (False, "merged")):
            step = tofu(vectors[f"{name}.metric"], r=r, prune=prune, sizes=sizes)
            assert isinstance(step, Reduction) and step.padding is None
            assert torch.equal(step.assignment.int(), vectors[f"{case}.assignment"])
            torch.testing.assert_close(step.sizes, vectors[f"{case}.size"][..., 0], **CLOSE)
            torch.testing.assert_close(step.merge(vectors[f"{name}.x"]), vectors[f"{case}.{values}"], **CLOSE)
            wide = step.widened(step.width + 3)
            padded = torch.nn.functional.pad(vectors[f"{case}.{values}"], (0, 0, 0, 3))
            torch.testing.assert_close(wide.merge(vectors[f"{name}.x"]), padded, **CLOSE)


def test_the_first_half_of_the_blocks_prunes():
    assert [layer for layer in range(1, 13) if prunes(layer, 12)] == [1, 2, 3, 4, 5, 6, 7]
    assert [layer for layer in range(1, 6) if prunes(layer, 5)] == [1, 2, 3]
    assert prunes(1, 1)


def by_definition(x, assignment, form):
    """Every group's value, token by token: the destination of a group is its token at an odd position."""
    merged = []
    for group in range(int(assignment.max()) + 1):
        members = (assignment == group).nonzero().flatten().tolist()
        destination = next((i for i in members if i % 2 == 1), members[0])
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
            variant = "code" if form == "pruned" else form
            step = tofu(metric, r=7, prune=form == "pruned", prefix=prefix, variant=variant)
            patches = step.without_prefix(prefix)
            for image in range(2):
                expected = by_definition(x[image], step.assignment[image], form)
                torch.testing.assert_close(step.merge(x)[image], expected)
                torch.testing.assert_close(patches.merge(x[:, prefix:])[image], expected[prefix:])


def test_the_paper_gives_the_largest_norm_back():
    x = torch.randn(1, 20, 5)
    step = tofu(torch.randn(1, 20, 4), r=9, prune=False, variant="paper")
    largest = torch.zeros(1, step.width).scatter_reduce(1, step.assignment, x.norm(dim=-1), "amax")
    torch.testing.assert_close(step.merge(x).norm(dim=-1), largest)


def test_steps_seen_as_one_are_the_steps_one_by_one():
    for modes in ((True, True, True), (True, False, True), (False, False), (True, True, False, False)):
        for prefix in (0, 1):
            x, total, sizes = torch.randn(2, 40, 6), None, None
            stepwise, width = x, 40
            for prune in modes:
                step = tofu(torch.randn(2, width, 4), r=6, prune=prune, sizes=sizes, prefix=1).without_prefix(prefix)
                stepwise, sizes = step.merge(stepwise if total else x[:, prefix:]), step.sizes
                sizes = torch.nn.functional.pad(sizes, (prefix, 0), value=1)  # the next step sees the whole sequence
                total, width = step if total is None else total.then(step), width - 6
            assert isinstance(total, Grouping if all(modes) else Chain)
            torch.testing.assert_close(total.merge(x[:, prefix:]), stepwise)
            torch.testing.assert_close(total.sizes, sizes[:, prefix:])
            assert torch.equal(total.sizes.sum(1), torch.full((2,), 40.0 - prefix))
            rows = total.assignment.unsqueeze(-1).expand(-1, -1, 6)
            assert torch.equal(total.unmerge(stepwise), stepwise.gather(1, rows))


def test_padding_counts_nothing():
    metric, x, sizes = torch.randn(2, 20, 4), torch.randn(2, 20, 6), torch.randint(1, 5, (2, 20)).float()
    sizes[:, 0], sizes[1, 13:] = 1, 0
    for prefix in (0, 1):
        for prune in (True, False):
            batch = tofu(metric, r=20, prune=prune, sizes=sizes, prefix=prefix)
            alone = tofu(metric[1:, :13], r=20, prune=prune, sizes=sizes[1:, :13], prefix=prefix)
            torch.testing.assert_close(batch.merge(x)[1, : alone.width], alone.merge(x[1:, :13])[0])
            assert not batch.merge(x)[1, alone.width :].any()
            torch.testing.assert_close(batch.sizes[1, : alone.width], alone.sizes[0])


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
    x[:, 1::2] = 0  # every destination
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
