"""Mutual pairs: a slow reference, ties, padding, batches."""

import numpy as np
import pytest
import torch

from g2tm import mutual_pairs
from tests.g2tm.oracle import assert_each_is_alone, pad


def by_definition(x, n_merges=None):
    """Assignment of one image from all similarities; with n_merges, of that many pairs, the most similar."""
    unit = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    similarity = unit @ unit.T
    np.fill_diagonal(similarity, -np.inf)
    partner = similarity.argmax(1)
    pairs = [(-similarity[i, j], i, j) for i, j in enumerate(partner) if i < j and partner[j] == i]
    target = {j: i for _, i, j in sorted(pairs)[:n_merges]}
    place = {token: place for place, token in enumerate(i for i in range(len(x)) if i not in target)}
    return [place[target.get(token, token)] for token in range(len(x))], len(pairs)


def test_groups_and_order_are_those_of_the_definition():
    for n_tokens in (2, 3, 10, 33):
        for dim in (2, 8):
            x = torch.randn(3, n_tokens, dim)
            expected = [by_definition(image.double().numpy()) for image in x]
            reduction = mutual_pairs(x)
            assert reduction.assignment.tolist() == [assignment for assignment, _ in expected]
            assert reduction.counts.tolist() == list(reduction.lengths) == [n_tokens - n for _, n in expected]
            fewest = min(n for _, n in expected)
            uniform = mutual_pairs(x, batch="uniform")
            assert uniform.lengths == (n_tokens - fewest,) * 3 and uniform.padding is None
            for image, found in zip(x, uniform.assignment.tolist(), strict=True):
                assert found == by_definition(image.double().numpy(), fewest)[0]


def test_the_mean_counts_patches():
    x, sizes = torch.tensor([[[1.0, 0], [0, 3], [4, 0]]]), torch.tensor([[1.0, 1, 2]])
    reduction = mutual_pairs(x, sizes=sizes)
    assert reduction.assignment.tolist() == [[0, 1, 0]] and reduction.sizes.tolist() == [[3, 1]]
    torch.testing.assert_close(reduction.merge(x), torch.tensor([[[3.0, 0], [0, 3]]]))


def test_padding_never_pairs_and_stays_last():
    x, sizes, lengths = torch.randn(5, 20, 4), torch.randint(0, 5, (5, 20)).float(), [20, 14, 2, 1, 0]
    for own in (None, sizes):
        assert_each_is_alone(lambda x, sizes, padding: mutual_pairs(x, sizes=sizes, padding=padding), x, lengths, own)


def test_uniform_with_padding_merges_as_many_pairs_in_every_image():
    x, lengths = torch.randn(3, 20, 4), [20, 14, 9]
    padded, padding = pad(x, lengths)
    fewest = min(by_definition(image[:n].double().numpy())[1] for image, n in zip(x, lengths, strict=True))
    step = mutual_pairs(padded, padding=padding, batch="uniform")
    for image, length in enumerate(lengths):
        expected = by_definition(x[image, :length].double().numpy(), fewest)[0]
        assert step.assignment[image, :length].tolist() == expected and step.lengths[image] == length - fewest


def test_equally_similar_tokens_go_to_the_lower_index():
    assert mutual_pairs(torch.ones(1, 5, 3)).assignment.tolist() == [[0, 0, 1, 2, 3]]
    assert mutual_pairs(torch.zeros(1, 5, 3)).assignment.tolist() == [[0, 0, 1, 2, 3]]


def test_tokens_that_are_not_finite_stay_alone():
    x = torch.randn(2, 12, 4)
    x[:, 3], x[0, 7, 1] = float("nan"), float("inf")
    reduction = mutual_pairs(x)
    for image, strange in ((0, [3, 7]), (1, [3])):
        rest = [token for token in range(12) if token not in strange]
        groups, n_pairs = by_definition(x[image, rest].double().numpy())
        assert reduction.counts[image] == 12 - n_pairs
        for token in strange:
            assert (reduction.assignment[image] == reduction.assignment[image, token]).sum() == 1
        same = reduction.assignment[image, rest, None] == reduction.assignment[image, None, rest]
        assert torch.equal(same, torch.tensor(groups)[:, None] == torch.tensor(groups))
    assert mutual_pairs(torch.full((1, 4, 2), float("nan"))).lengths == (4,)


def test_fewer_than_two_tokens_and_no_image():
    for shape in ((2, 1, 4), (2, 0, 4), (0, 7, 4), (0, 1, 4)):
        x = torch.randn(shape)
        for batch in ("ragged", "uniform"):
            reduction = mutual_pairs(x, batch=batch)
            assert torch.equal(reduction.unmerge(reduction.merge(x)), x)
            assert reduction.lengths == (shape[1],) * shape[0]


def test_long_sequences_are_matched_in_parts(monkeypatch):
    x = torch.randn(2, 101, 4)
    whole = mutual_pairs(x)
    monkeypatch.setattr("g2tm.similarity.MAX_SIMILARITIES", 700)
    assert torch.equal(mutual_pairs(x).assignment, whole.assignment)


def test_half_precision_tokens_are_compared_in_float32():
    x = torch.randn(1, 64, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mutual_pairs(x).assignment, mutual_pairs(x.float()).assignment)


def test_an_unknown_batch_mode_is_refused():
    with pytest.raises(ValueError, match="ragged or uniform"):
        mutual_pairs(torch.randn(1, 8, 3), batch="even")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_assignment_of_the_cpu():
    x = torch.randn(2, 200, 16)
    assert torch.equal(mutual_pairs(x.cuda()).assignment.cpu(), mutual_pairs(x).assignment)
