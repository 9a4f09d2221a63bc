"""Bipartite soft matching: conformance, order, thresholds, batches, errors."""

import pytest
import torch

from g2tm import bipartite
from g2tm.matching import adaptive_threshold, best_partners


def test_one_step_is_the_published_one(cases):
    for r in (1, 31, 60, 100):
        assert_published(cases, r)


def assert_published(cases, r):
    reduction = bipartite(cases["tome.metric"], r=r, sizes=cases["tome.size"][..., 0])
    merged = reduction.merge(cases["tome.x"])
    torch.testing.assert_close(merged, cases[f"tome.r{r}.x"], atol=1e-5, rtol=0)
    torch.testing.assert_close(reduction.sizes, cases[f"tome.r{r}.size"][..., 0])
    assert torch.equal(reduction.assignment, cases[f"tome.r{r}.assignment"].view(2, 145))
    torch.testing.assert_close(reduction.unmerge(merged), cases[f"tome.r{r}.unmerged"], atol=1e-5, rtol=0)


def by_definition(metric, n_merges, prefix):
    """The matching of one image, token by token: (source, target) pairs, most similar first."""
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    pairs = []
    for a in range(0, len(metric), 2):
        if a >= prefix:
            targets = [b for b in range(1, len(metric), 2) if b >= prefix]
            best = max(targets, key=lambda b: (unit[a] @ unit[b]).item())
            pairs.append((-(unit[a] @ unit[best]).item(), a, best))
    return [(a, b) for _, a, b in sorted(pairs)[:n_merges]]


def test_groups_and_order_are_those_of_the_definition():
    for prefix in (0, 1, 2, 5):
        for length in (12, 17):
            for r in (0, 1, 3, 100):
                metric = torch.randn(2, length, 6)
                reduction = bipartite(metric, r=r, prefix=prefix)
                for image in range(2):
                    merges = dict(by_definition(metric[image], min(r, (length - prefix) // 2), prefix))
                    stay = list(range(prefix))
                    stay += [i for i in range(prefix, length) if i % 2 == 0 and i not in merges]
                    stay += [i for i in range(prefix, length) if i % 2 == 1]
                    expected = {token: place for place, token in enumerate(stay)}
                    expected |= {source: expected[target] for source, target in merges.items()}
                    assert reduction.assignment[image].tolist() == [expected[i] for i in range(length)]
                    assert reduction.counts[image] == reduction.lengths[image] == len(stay)


def test_no_image_gives_no_image():
    metric = torch.randn(0, 9, 4)
    uniform = {"threshold": "adaptive", "layer": 2, "batch": "uniform"}
    for arguments in ({"r": 3}, {"threshold": 0.1}, uniform, {"r": 3, "sizes": torch.ones(0, 9)}):
        reduction = bipartite(metric, **arguments)
        assert reduction.unmerge(reduction.merge(metric)).shape == metric.shape and reduction.lengths == ()


def test_prefix_tokens_and_padding_alone():
    reduction = bipartite(torch.randn(2, 3, 4), r=1, prefix=2, sizes=torch.tensor([[1.0, 1, 0], [1, 1, 0]]))
    assert reduction.counts.tolist() == [2, 2] and reduction.sizes.tolist() == [[1, 1], [1, 1]]


def test_a_threshold_merges_what_exceeds_it():
    metric = torch.randn(3, 21, 5)
    reduction = bipartite(metric, threshold=0.5)
    for image in range(3):
        pairs = by_definition(metric[image], 100, 1)
        unit = torch.nn.functional.normalize(metric[image], dim=-1)
        above = sum((unit[a] @ unit[b]).item() > 0.5 for a, b in pairs)
        assert reduction.counts[image] == 21 - above


def test_adaptive_threshold_is_mean_plus_std_over_layer():
    metric = torch.randn(2, 30, 5)
    similarity, _ = best_partners(metric, prefix=1)
    best = similarity[:, 1:]  # without CLS
    expected = best.mean(1, keepdim=True) + best.std(1, keepdim=True) / 5
    torch.testing.assert_close(adaptive_threshold(similarity, 5), expected)
    merged = bipartite(metric, threshold="adaptive", layer=5)
    assert torch.equal(30 - merged.counts, (best > expected).sum(1))


def test_uniform_averages_the_adaptive_threshold_and_keeps_one_number():
    metric = torch.cat([torch.randn(1, 30, 5), torch.randn(1, 30, 5) + 3])
    ragged = bipartite(metric, threshold="adaptive", layer=1)
    uniform = bipartite(metric, threshold="adaptive", layer=1, batch="uniform")
    assert uniform.padding is None and len(set(uniform.counts.tolist())) == 1
    assert not torch.equal(ragged.counts, uniform.counts)


def test_a_batch_equals_its_images_with_and_without_padding():
    metric, sizes = torch.randn(3, 20, 4), torch.randint(1, 5, (3, 20)).float()
    sizes[:, 0] = 1
    lengths = [20, 15, 8]
    for image, length in enumerate(lengths):
        sizes[image, length:] = 0
    batch = bipartite(metric, threshold=0.2, sizes=sizes)
    for image, length in enumerate(lengths):
        alone = bipartite(metric[image : image + 1, :length], threshold=0.2, sizes=sizes[image : image + 1, :length])
        assert torch.equal(batch.assignment[image, :length], alone.assignment[0])
        count = alone.counts.item()
        assert batch.counts[image] == count and not batch.sizes[image, count:].any()
        torch.testing.assert_close(batch.sizes[image, :count], alone.sizes[0])
        x = torch.randn(3, 20, 4)
        torch.testing.assert_close(
            batch.merge(x)[image, :count], alone.merge(x[image : image + 1, :length])[0], atol=1e-6, rtol=1e-5
        )


def test_long_sequences_are_matched_in_parts(monkeypatch):
    metric = torch.randn(2, 101, 4)
    whole = bipartite(metric, r=20)
    monkeypatch.setattr("g2tm.selection.MAX_SIMILARITIES", 300)
    assert torch.equal(bipartite(metric, r=20).assignment, whole.assignment)


def test_equal_similarities_go_to_the_lower_index():
    reduction = bipartite(torch.ones(1, 9, 3), r=2)
    assert reduction.assignment.tolist() == [[0, 3, 3, 4, 3, 5, 1, 6, 2]]


def test_a_token_that_is_not_finite_does_not_merge():
    for r in (1, 3):
        metric = torch.randn(1, 12, 4)
        metric[0, 4] = float("nan")
        reduction = bipartite(metric, r=r, prefix=0)
        assert (reduction.assignment == reduction.assignment[0, 4]).sum() == 1
        assert reduction.counts.item() == 12 - r


def test_tokens_that_are_not_finite_merge_last_and_prefix_tokens_never():
    metric = torch.randn(2, 12, 4)
    metric[:, [2, 4, 6]] = float("nan")
    reduction = bipartite(metric, r=4, prefix=2)
    assert reduction.counts.tolist() == [8, 8] and reduction.padding is None
    for image in range(2):
        groups = reduction.assignment[image]
        assert all((groups == groups[token]).sum() == 1 for token in (0, 1))
        merged = [token for token in (2, 4, 6, 8, 10) if (groups == groups[token]).sum() > 1]
        assert {8, 10} <= set(merged) and len(merged) <= 5


def test_sizes_without_padding_need_not_be_searched_for_it():
    for r in (0, 3, 100):
        for prefix in (0, 1, 3):
            metric, sizes = torch.randn(2, 15, 4), torch.randint(1, 5, (2, 15)).float()
            searched, told = (
                bipartite(metric, r=r, sizes=sizes, prefix=prefix, padded=padded) for padded in (True, False)
            )
            assert torch.equal(searched.assignment, told.assignment) and torch.equal(searched.counts, told.counts)
            assert torch.equal(searched.sizes, told.sizes) and told.padding is None and searched.padding is None


def test_sequences_with_hardly_a_token():
    for length in (1, 2, 3):
        for arguments in ({"r": 5}, {"threshold": "adaptive", "layer": 2}, {"threshold": -1.0}):
            reduction = bipartite(torch.randn(2, length, 4), **arguments)
            assert reduction.sizes.sum(1).tolist() == [length, length]


def test_without_prefix_speaks_of_patches_alone():
    metric, x = torch.randn(2, 13, 4), torch.randn(2, 13, 4)
    whole = bipartite(metric, r=3, prefix=3)
    patches = whole.without_prefix(3)
    torch.testing.assert_close(patches.merge(x[:, 3:]), whole.merge(x)[:, 3:])
    torch.testing.assert_close(whole.merge(x)[:, :3], x[:, :3])
    assert torch.equal(patches.counts, whole.counts - 3)


def test_bad_arguments_are_named():
    for arguments, allowed in (
        ({}, "exactly one"),
        ({"r": 1, "threshold": 0.5}, "exactly one"),
        ({"r": 1, "tokens": 5}, "exactly one"),
        ({"tokens": 3}, "can leave 4 to 7 patch tokens"),
        ({"tokens": 2, "prefix": 2}, "can leave 3 to 6 patch tokens"),
        ({"tokens": 8}, "can leave 4 to 7 patch tokens"),
        ({"tokens": 1.5}, "can leave 4 to 7 patch tokens"),
        ({"r": -1}, "0 or more"),
        ({"r": 1.5}, "0 or more"),
        ({"threshold": 2}, "-1 to 1"),
        ({"threshold": "adaptive"}, "1-based layer"),
        ({"r": 1, "batch": "even"}, "ragged or uniform"),
        ({"r": 1, "prefix": -1}, "prefix"),
        ({"r": 1, "prefix": 9}, "prefix"),
        ({"threshold": "adaptive", "layer": 1.5}, "1-based layer"),
    ):
        with pytest.raises(ValueError, match=allowed):
            bipartite(torch.randn(1, 8, 3), **arguments)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_assignment_of_the_cpu():
    metric = torch.randn(2, 200, 16)
    assert torch.equal(bipartite(metric.cuda(), r=50).assignment.cpu(), bipartite(metric, r=50).assignment)
