"""Bipartite soft matching: conformance, order, thresholds, batches, errors."""

import pytest
import torch

from g2tm import bipartite
from g2tm.matching import adaptive_threshold, best_partners
from tests.g2tm.oracle import assert_each_is_alone, pad


def test_one_step_is_the_published_one(cases):
    for r in (1, 31, 60, 100):
        assert_published(cases, r)


def assert_published(cases, r):
    """The vectors are of sequences with CLS in front, which merges with none."""
    metric, x, sizes = (cases[f"tome.{name}"][:, 1:] for name in ("metric", "x", "size"))
    expected = {name: cases[f"tome.r{r}.{name}"] for name in ("x", "size", "unmerged")}
    assignment = cases[f"tome.r{r}.assignment"].view(2, 145)
    reduction = bipartite(metric, r=r, sizes=sizes[..., 0])
    merged = reduction.merge(x)
    torch.testing.assert_close(merged, expected["x"][:, 1:], atol=1e-5, rtol=0)
    torch.testing.assert_close(reduction.sizes, expected["size"][:, 1:, 0])
    assert torch.equal(1 + reduction.assignment, assignment[:, 1:]) and not assignment[:, 0].any()
    torch.testing.assert_close(reduction.unmerge(merged), expected["unmerged"][:, 1:], atol=1e-5, rtol=0)


def by_definition(metric, n_merges, prefix):
    """The matching of one image, token by token: (source, target) pairs, most similar first.

    metric: (L, D), the whole sequence, of which `prefix` tokens take no part.
    """
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    pairs = []
    for a in range(0, len(metric), 2):
        if a >= prefix:
            targets = [b for b in range(1, len(metric), 2) if b >= prefix]
            best = max(targets, key=lambda b: (unit[a] @ unit[b]).item())
            pairs.append((-(unit[a] @ unit[best]).item(), a, best))
    return [(a, b) for _, a, b in sorted(pairs)[:n_merges]]


def whole_assignment(metric, n_merges, prefix):
    """Of the whole sequence: prefix tokens, A tokens that stay, B tokens."""
    merges, length = dict(by_definition(metric, n_merges, prefix)), len(metric)
    stay = list(range(prefix))
    stay += [i for i in range(prefix, length) if i % 2 == 0 and i not in merges]
    stay += [i for i in range(prefix, length) if i % 2 == 1]
    slots = {token: slot for slot, token in enumerate(stay)}
    return [slots[merges.get(token, token)] for token in range(length)], len(stay)


def test_groups_and_order_are_those_of_the_definition():
    for prefix in (0, 1, 2, 5):
        for length in (12, 17):
            for r in (0, 1, 3, 100):
                metric = torch.randn(2, length, 6)
                reduction = bipartite(metric[:, prefix:], r=r, odd_first=prefix % 2 == 1)
                for image in range(2):
                    expected, count = whole_assignment(metric[image], min(r, (length - prefix) // 2), prefix)
                    assert [*range(prefix), *(prefix + reduction.assignment[image]).tolist()] == expected
                    assert prefix + reduction.counts[image] == prefix + reduction.lengths[image] == count


def test_tokens_that_stay_may_keep_their_order():
    x = torch.randn(3, 11, 5)
    padding = torch.arange(11) >= torch.tensor([11, 9, 2])[:, None]
    for given in ({"r": 4}, {"tokens": 7}, {"threshold": 0.3}, {"r": 3, "padding": padding}):
        for odd_first in (True, False):
            given |= {"odd_first": odd_first}
            moved, kept = bipartite(x, **given), bipartite(x, **given, keep_order=True)
            assert torch.equal(moved.counts, kept.counts)
            for image, n_tokens in enumerate(kept.counts.tolist()):
                own = slice(None) if "padding" not in given else ~padding[image]
                groups = [one.assignment[image][own] for one in (moved, kept)]
                pairs = [(g[:, None] == g) for g in groups]
                assert torch.equal(*pairs)  # the same groups, each in the place of its token in B or of its only one
                is_b = torch.arange(len(groups[1])) % 2 == int(not odd_first)
                stayed = is_b | (pairs[1].sum(1) == 1)
                assert groups[1][stayed].tolist() == list(range(n_tokens))


def test_a_budget_is_reached_by_either_parity():
    for n_tokens in (1, 2, 7, 8):
        for odd_first in (True, False):
            x = torch.randn(2, n_tokens, 4)
            fewest = (n_tokens + odd_first) // 2 or 1
            for tokens in range(fewest, n_tokens + 1):
                assert bipartite(x, tokens=tokens, odd_first=odd_first).lengths == (tokens, tokens)
            with pytest.raises(ValueError, match=f"{fewest} to {n_tokens} patch tokens"):
                bipartite(x, tokens=fewest - 1, odd_first=odd_first)


def test_no_image_gives_no_image():
    metric = torch.randn(0, 9, 4)
    uniform = {"threshold": "adaptive", "layer": 2, "batch": "uniform"}
    for arguments in ({"r": 3}, {"threshold": 0.1}, uniform, {"r": 3, "padding": torch.zeros(0, 9, dtype=torch.bool)}):
        reduction = bipartite(metric, **arguments)
        assert reduction.unmerge(reduction.merge(metric)).shape == metric.shape and reduction.lengths == ()


def test_hardly_a_token():
    for n_tokens in (0, 1, 2, 3):
        for odd_first in (True, False):
            x = torch.randn(2, n_tokens, 4)
            for arguments in ({"r": 5}, {"threshold": "adaptive", "layer": 2}, {"threshold": -1.0}):
                for lengths in (None, [n_tokens, 0], [n_tokens, min(n_tokens, 1)]):
                    padding = None if lengths is None else torch.arange(n_tokens) >= torch.tensor(lengths)[:, None]
                    step = bipartite(x, odd_first=odd_first, padding=padding, **arguments)
                    assert step.sizes.sum(1).tolist() == (lengths or [n_tokens] * 2)
                    assert lengths is None or step.lengths[1] == lengths[1]
            assert bipartite(x, r=5, odd_first=odd_first).lengths == (n_tokens - n_tokens // 2,) * 2


def test_a_threshold_merges_what_exceeds_it():
    for prefix in (0, 1):
        metric = torch.randn(3, 21, 5)
        reduction = bipartite(metric[:, prefix:], threshold=0.5, odd_first=prefix == 1)
        for image in range(3):
            pairs = by_definition(metric[image], 100, prefix)
            unit = torch.nn.functional.normalize(metric[image], dim=-1)
            above = sum((unit[a] @ unit[b]).item() > 0.5 for a, b in pairs)
            assert reduction.counts[image] == 21 - prefix - above
            assert (prefix + reduction.assignment[image]).tolist() == whole_assignment(metric[image], above, prefix)[0][
                prefix:
            ]


def test_adaptive_threshold_is_mean_plus_std_over_layer():
    metric = torch.randn(2, 30, 5)
    best, _ = best_partners(metric)
    expected = best.mean(1, keepdim=True) + best.std(1, keepdim=True) / 5
    torch.testing.assert_close(adaptive_threshold(best, 5), expected)
    merged = bipartite(metric, threshold="adaptive", layer=5)
    assert torch.equal(30 - merged.counts, (best > expected).sum(1))


def test_uniform_averages_the_adaptive_threshold_and_keeps_one_number():
    metric = torch.cat([torch.randn(1, 30, 5), torch.randn(1, 30, 5) + 3])
    ragged = bipartite(metric, threshold="adaptive", layer=1)
    uniform = bipartite(metric, threshold="adaptive", layer=1, batch="uniform")
    assert uniform.padding is None and len(set(uniform.counts.tolist())) == 1
    assert not torch.equal(ragged.counts, uniform.counts)


def test_a_padded_batch_is_its_images():
    metric, sizes, lengths = torch.randn(5, 20, 4), torch.randint(0, 5, (5, 20)).float(), [20, 15, 8, 1, 0]
    for rule in ({"r": 3}, {"r": 100}, {"threshold": 0.2}, {"threshold": "adaptive", "layer": 2}):
        for odd_first in (True, False):
            for own in (None, sizes):
                assert_each_is_alone(
                    lambda x, sizes, padding, rule=rule, odd=odd_first: bipartite(
                        x, sizes=sizes, padding=padding, odd_first=odd, **rule
                    ),
                    metric,
                    lengths,
                    own,
                )


def test_uniform_with_padding_merges_as_many_pairs_in_every_image():
    metric, lengths = torch.randn(3, 20, 4), [20, 15, 8]
    padded, padding = pad(metric, lengths)
    ragged = bipartite(padded, threshold=0.1, padding=padding)
    uniform = bipartite(padded, threshold=0.1, padding=padding, batch="uniform")
    fewest = min(length - count for length, count in zip(lengths, ragged.lengths, strict=True))
    assert fewest > 0 and uniform.lengths == tuple(length - fewest for length in lengths)
    for image, length in enumerate(lengths):
        whole = torch.cat([torch.zeros(1, 4), metric[image, :length]])
        expected = whole_assignment(whole, fewest, 1)[0][1:]
        assert (1 + uniform.assignment[image, :length]).tolist() == expected


def test_long_sequences_are_matched_in_parts(monkeypatch):
    metric = torch.randn(2, 101, 4)
    whole = bipartite(metric, r=20)
    monkeypatch.setattr("g2tm.similarity.MAX_SIMILARITIES", 300)
    assert torch.equal(bipartite(metric, r=20).assignment, whole.assignment)


def test_equal_similarities_go_to_the_lower_index():
    assert bipartite(torch.ones(1, 8, 3), r=2).assignment.tolist() == [[2, 2, 3, 2, 4, 0, 5, 1]]
    assert bipartite(torch.ones(1, 8, 3), r=2, odd_first=False).assignment.tolist() == [[2, 2, 2, 3, 0, 4, 1, 5]]


def test_a_token_that_is_not_finite_does_not_merge():
    for r in (1, 3):
        metric = torch.randn(1, 12, 4)
        metric[0, 4] = float("nan")
        reduction = bipartite(metric, r=r, odd_first=False)
        assert (reduction.assignment == reduction.assignment[0, 4]).sum() == 1
        assert reduction.counts.item() == 12 - r


def test_tokens_that_are_not_finite_merge_last():
    metric = torch.randn(2, 10, 4)
    metric[:, [0, 2, 4]] = float("nan")
    reduction = bipartite(metric, r=4, odd_first=False)
    assert reduction.counts.tolist() == [6, 6] and reduction.padding is None
    for image in range(2):
        groups = reduction.assignment[image]
        merged = [token for token in (0, 2, 4, 6, 8) if (groups == groups[token]).sum() > 1]
        assert {6, 8} <= set(merged) and len(merged) <= 5
    reduction = bipartite(metric, threshold=-1.0, odd_first=False)
    assert all((reduction.assignment == reduction.assignment[:, token : token + 1]).sum() == 2 for token in (0, 2, 4))


def test_a_target_that_is_not_finite_stops_a_threshold():
    """Its similarity to every token is no number."""
    metric = torch.ones(1, 8, 3)
    metric[0, 2] = float("nan")
    assert bipartite(metric, threshold=0.5).lengths == (8,) and bipartite(metric, r=2).lengths == (6,)


def test_bad_arguments_are_named():
    for arguments, allowed in (
        ({}, "exactly one"),
        ({"r": 1, "threshold": 0.5}, "exactly one"),
        ({"r": 1, "tokens": 5}, "exactly one"),
        ({"tokens": 3}, "can leave 4 to 7 patch tokens"),
        ({"tokens": 2, "odd_first": False}, "can leave 3 to 7 patch tokens"),
        ({"tokens": 8}, "can leave 4 to 7 patch tokens"),
        ({"tokens": 1.5}, "can leave 4 to 7 patch tokens"),
        ({"tokens": 5, "padding": torch.zeros(1, 7, dtype=torch.bool)}, "no padding"),
        ({"r": -1}, "0 or more"),
        ({"r": 1.5}, "0 or more"),
        ({"threshold": 2}, "-1 to 1"),
        ({"threshold": "adaptive"}, "1-based layer"),
        ({"r": 1, "batch": "even"}, "ragged or uniform"),
        ({"threshold": "adaptive", "layer": 1.5}, "1-based layer"),
    ):
        with pytest.raises(ValueError, match=allowed):
            bipartite(torch.randn(1, 7, 3), **arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_assignment_of_the_cpu():
    metric = torch.randn(2, 200, 16)
    assert torch.equal(bipartite(metric.cuda(), r=50).assignment.cpu(), bipartite(metric, r=50).assignment)
