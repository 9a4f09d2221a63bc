"""A compiled Segmenter: the same results, few compilations, and a way back."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from operator import attrgetter

import pytest
import torch

import patch
from g2tm import Grouping
from patch import layout
from segm.model.factory import create_segmenter
from tests.families import FAMILIES, MASKS, eva, hugging, segmenter, vit
from tests.helpers import by_speed, different_images

METHODS = {
    "graph": {"threshold": 0.2},
    "algm": {"layers": [1, 2], "threshold": 0.1},
    "mpm": {"layers": [1, 2]},  # in front of a block
    "ltmp": {"merge_threshold": 0.1, "prune_threshold": 0.01},  # looks at attention
}
ROTARY = {"backbone": "vit_small_patch16_dinov3"}
SIZES = ((64, 64), (48, 80), (60, 60), (64, 64))


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def net(small_net):
    return small_net | {"image_size": [64, 64], "n_layers": 2}


def create(net, method, **options):
    return patch.apply(create_segmenter(net).eval(), method, **METHODS[method] | options)


def check_equal(model, compiled, images, tolerance=1e-5):
    """Logits and reductions, but for the padding up to a bucket."""
    torch.testing.assert_close(compiled(images), model(images), atol=tolerance, rtol=1e-5)
    found, expected = patch.reduction(compiled), patch.reduction(model)
    assert found.lengths == expected.lengths and torch.equal(found.counts, expected.counts)
    n_tokens = expected.sizes.shape[1]
    torch.testing.assert_close(found.sizes[:, :n_tokens], expected.sizes)
    assert hasattr(found, "assignment") == hasattr(expected, "assignment")
    if hasattr(found, "assignment"):
        assert torch.equal(found.assignment, expected.assignment)
        assert found.sizes.shape[1] % 8 == 0 or found.sizes.shape[1] <= expected.assignment.shape[1]
        assert found.padding is None or torch.equal(found.padding, found.sizes == 0)


def batches(sizes=SIZES, n_images=(1, 2), repeats=3):
    """Images that merge more and less."""
    for size in sizes:
        for n in n_images:
            for scale in range(1, repeats + 1):
                yield torch.randn(n, 3, *size) * torch.tensor([0.2, 1.0])[:n].view(n, 1, 1, 1) * scale


class Counting:
    """A backend that runs what it is given as it is, and notes the shapes of the tokens or images in it."""

    def __init__(self):
        self.shapes = []

    def __call__(self, graph, inputs):
        self.shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.ndim > 2])
        return graph.forward


SHARED = [("vit", "graph"), ("eva", "graph"), ("ViT", "algm"), ("Dinov2", "graph"), ("mask transformer", "graph")]
DEEP = {
    "vit": lambda: vit(depth=12),
    "eva": lambda: eva(depth=12),
    "ViT": lambda: hugging("ViT", num_hidden_layers=12),
    "Dinov2": lambda: hugging(num_hidden_layers=12),
    "mask transformer": lambda: segmenter(**MASKS, n_layers=12),
}


@pytest.mark.parametrize(("kind", "method"), by_speed(SHARED, SHARED[:1], SHARED[2:3]))
@torch.no_grad()
@torch._dynamo.config.patch(fail_on_recompile_limit_hit=True)
def test_plain_compile_of_a_deep_vit_stays_within_the_recompile_limit(kind, method):
    """Twelve blocks are more than Dynamo compiles of one function; all share what is compiled, and so do images."""
    backend, seen = Counting(), set()
    model = FAMILIES[kind].patched(method, model=DEEP[kind](), attention="proportional", threshold=0.85)
    compiled, read = torch.compile(model, backend=backend), attrgetter("last_hidden_state")
    for images in [different_images(2) * scale for scale in torch.linspace(0.2, 2, 8)]:
        expected, lengths = model(images), patch.reduction(model).lengths
        found = compiled(images)
        assert patch.reduction(model).lengths == lengths
        if not isinstance(found, torch.Tensor):
            found, expected = read(found), read(expected)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        seen.add(tuple(lengths))
    assert len(seen) > 2 and len(backend.shapes) <= 12


def test_plain_compile_trains_with_a_threshold():
    images, gradients = different_images(2), []
    for compiles in (False, True):
        model = FAMILIES["vit"].patched("graph", threshold=0.8).train()
        call = torch.compile(model, backend="eager") if compiles else model
        call(images).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


def test_a_threshold_is_no_one_graph_and_says_so():
    compiled = torch.compile(FAMILIES["vit"].patched("graph"), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="how many tokens are left: give tokens="):
        compiled(different_images(1))


CASES = [("graph", None), ("algm", "proportional"), ("mpm", None), ("ltmp", None), ("graph", "inverse")]
MORE_CASES = [*CASES, ("algm", None)]


@pytest.mark.parametrize(("method", "attention"), by_speed(CASES, CASES[:1]))
@torch.inference_mode()
def test_outputs_are_those_of_the_eager_model_and_every_part_is_compiled_once(net, method, attention):
    model, backend, widths = create(net, method, attention=attention), Counting(), set()
    compiled = patch.compile(copy.deepcopy(model), bucket=8, backend=backend)
    for images in batches(SIZES[:1], n_images=(2,), repeats=6):
        check_equal(model, compiled, images)
        widths.add(patch.reduction(compiled).sizes.shape[1])
    n_merges = len(patch.reductions(compiled))
    assert len(backend.shapes) == n_merges + 2  # one part more than there are merges, and the decoder
    assert n_merges == {"graph": 1}.get(method, 2) and (len(widths) > 1 or method != "graph")


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "attention"), MORE_CASES)
@pytest.mark.parametrize(("more", "sizes"), [({}, SIZES), (ROTARY, SIZES[:2])])
@torch.inference_mode()
def test_outputs_of_many_sizes_are_those_of_the_eager_model(net, more, sizes, method, attention):
    model = create(net | more, method, attention=attention)
    compiled = patch.compile(copy.deepcopy(model), bucket=8, backend="eager")
    for images in batches(sizes, n_images=(2,), repeats=2):
        check_equal(model, compiled, images)


@pytest.mark.nightly
@torch.inference_mode()
def test_a_rotary_backbone_is_compiled(net):
    model = create(net | ROTARY, "graph")
    compiled = patch.compile(copy.deepcopy(model), bucket=8, backend="eager")
    for images in batches(SIZES[:2], n_images=(2,), repeats=1):
        check_equal(model, compiled, images)


@pytest.mark.parametrize(
    ("method", "backend"),
    by_speed(product(METHODS, ("inductor", "aot_eager"))),
)
@torch.inference_mode()
def test_backends_give_the_eager_outputs(net, method, backend):
    model = create(net, method)
    compiled = patch.compile(copy.deepcopy(model), bucket=16, mode="default", backend=backend)
    for images in batches(sizes=((64, 64), (48, 80)), repeats=1):
        check_equal(model, compiled, images, tolerance=2e-5)
        assert (compiled.predict(images) == model.predict(images)).float().mean() > 0.999


@pytest.mark.nightly
@torch.inference_mode()
def test_compilations_stay_bounded_over_sizes_and_batches(net):
    """Far fewer versions of a part than shapes; how many depends on what Dynamo takes for dynamic at first."""
    backend = Counting()
    model = patch.compile(create(net, "graph"), bucket=8, backend=backend)
    sizes = [(64, 64), (48, 80), (80, 48), (96, 64), (64, 40), (56, 56), (72, 88)]
    for images in batches(sizes=sizes, repeats=3):
        model.grid_logits(images)
    parts, n_batch_sizes = 3, 2
    assert len(backend.shapes) < parts * n_batch_sizes * len(sizes)


@torch.inference_mode()
def test_buckets_bound_the_shapes_and_merges_can_be_profiled(net):
    """Every width is a multiple of the bucket, or what there was before the merge."""
    model = patch.compile(create(net, "algm", layers=[1, 2]), bucket=24, backend="eager")
    with torch.profiler.profile() as profile, patch.merge_ranges(model, "merging"):
        model(torch.randn(1, 3, 64, 64))
    steps = patch.reductions(model)
    counts = [step.counts.item() for step in steps.values()]
    assert 48 < counts[0] <= 64 and 24 < counts[1] < 48
    assert [step.sizes.shape[1] for step in steps.values()] == [64, 48]
    assert sum(event.name == "merging" for event in profile.events()) == 3  # two layers, and the undoing


@pytest.mark.parametrize("method", by_speed(["graph", "mpm"], slow=["graph"]))
@torch.inference_mode()
def test_remove_takes_it_out(net, method):
    model, images = create_segmenter(net).eval(), torch.randn(2, 3, 64, 64)
    before, keys = model(images), list(model.state_dict())
    parameters = [id(p) for p in model.parameters()]
    attributes = [set(vars(module)) for module in model.modules()]
    patch.apply(model, method, **METHODS[method])
    patch.compile(model, backend="eager")(images)
    assert patch.is_compiled(model)
    assert list(model.state_dict()) == keys and [id(p) for p in model.parameters()] == parameters
    patch.remove(model)
    assert not patch.is_compiled(model) and not patch.is_patched(model)
    assert torch.equal(model(images), before)
    assert [set(vars(module)) for module in model.modules()] == attributes


@pytest.mark.nightly
@torch.inference_mode()
def test_a_copy_is_compiled_by_itself(net):
    """A pickle too, here one of a copy."""
    model, images = create(net, "graph"), torch.randn(1, 3, 64, 64)
    expected = model(images)
    patch.compile(model, backend="eager")(images)
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    for parameter in model.parameters():
        parameter.zero_()
    patch.remove(model)
    assert patch.is_compiled(twin) and patch.is_patched(twin)
    torch.testing.assert_close(twin(images), expected, atol=1e-5, rtol=1e-5)
    assert patch.reduction(twin) is not None and not patch.is_patched(model)
    patch.remove(twin)
    assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@torch.inference_mode()
def test_looking_inside_runs_as_it_is(net):
    """A hook would be passed by in compiled code."""
    model, images = create(net, "graph", attention="proportional"), torch.randn(1, 3, 64, 64)
    expected = [model.attention(images, 1), model.attention(images, 0, "decoder")]
    patch.compile(model, backend="eager")(images)
    found = [model.attention(images, 1), model.attention(images, 0, "decoder")]
    torch.testing.assert_close(found, expected)


@pytest.mark.nightly
@torch.inference_mode()
def test_weights_and_thresholds_may_change_afterwards(net):
    model, images = create(net, "graph"), torch.randn(1, 3, 64, 64)
    compiled = patch.compile(copy.deepcopy(model), backend="eager")
    compiled(images)
    for changed in (model, compiled):
        patch.set_threshold(changed, 0.4)
        changed.load_state_dict({key: 1.1 * value for key, value in changed.state_dict().items()})
    torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        compiled.double()(images.double()), model.double()(images.double()), atol=1e-6, rtol=1e-6
    )


@torch.inference_mode()
def test_linear_decoder(net):
    model = create(net | {"decoder": {"name": "linear"}}, "graph")
    compiled = patch.compile(copy.deepcopy(model), bucket=8, backend="eager")
    for images in batches(SIZES[:2], n_images=(2,), repeats=2):
        torch.testing.assert_close(compiled(images), model(images), atol=1e-5, rtol=1e-5)


@pytest.mark.nightly
@torch.inference_mode()
def test_the_bias_through_channels_compiles_too(net, monkeypatch):
    model = create(net, "graph", attention="proportional")
    expected = {images: model(images) for images in batches(sizes=((64, 64),), repeats=2)}
    monkeypatch.setattr(layout, "bias_in_channels", lambda x: True)
    backend = Counting()
    patch.compile(model, bucket=8, backend=backend)
    for images, scores in expected.items():
        torch.testing.assert_close(model(images), scores, atol=1e-5, rtol=1e-5)
    assert len(backend.shapes) == 2 * 3  # two batch sizes, no break inside a part


def test_a_pass_without_inference_mode_gives_no_gradients(net):
    model = patch.compile(create(net, "graph"), backend="eager")
    assert not model(torch.randn(1, 3, 64, 64)).requires_grad


def test_training_is_refused_with_the_reason(net):
    model = create(net, "graph")
    with pytest.raises(ValueError, match=r"model\.eval"):
        patch.compile(model.train())
    patch.compile(model.eval(), backend="eager").train()
    for part in (lambda: model(torch.randn(1, 3, 64, 64)), lambda: model.decoder(torch.randn(1, 9, 32))):
        with pytest.raises(ValueError, match=r"patch\.remove"):
            part()


def test_what_cannot_be_compiled_is_refused(net):
    model = create(net, "graph")
    with pytest.raises(ValueError, match="Segmenter"):
        patch.compile(model.encoder)
    for bucket in (0, 1.5, True):
        with pytest.raises(ValueError, match="from 1"):
            patch.compile(model, bucket=bucket)
    patch.compile(model, backend="eager")
    with pytest.raises(ValueError, match="compiled already"):
        patch.compile(model)
    plain = create_segmenter(net).eval()
    for one in (plain, patch.apply(plain, "tome"), patch.apply(patch.remove(plain), "graph", tokens=9)):
        with pytest.raises(ValueError, match=r"use torch\.compile, which makes one graph"):
            patch.compile(one)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("method", METHODS)
@torch.inference_mode()
def test_cuda_graphs_are_replayed(net, method):
    """What a pass returned must outlive the next ones."""
    model = create(net, method).cuda()
    compiled = patch.compile(copy.deepcopy(model), bucket=16)
    images = [images.cuda() for images in batches(sizes=((64, 64),), repeats=2)]
    expected = [model.grid_logits(batch) for batch in images]
    for _ in range(4):  # warm up, record, replay
        found = [compiled.grid_logits(batch) for batch in images]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


@pytest.mark.nightly
@torch.inference_mode()
def test_threads_share_a_compiled_model(net):
    model = patch.compile(create(net, "graph"), bucket=8, backend="eager")
    images = list(batches(SIZES[:1], n_images=(1, 2), repeats=2))
    expected = [(model(batch), patch.reduction(model).lengths) for batch in images]

    def run(batch):
        with torch.inference_mode():
            return [(model(batch), patch.reduction(model).lengths) for _ in range(5)][-1]

    with ThreadPoolExecutor(len(images)) as pool:
        for (found, lengths), (wanted, wanted_lengths) in zip(pool.map(run, images), expected, strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
            assert lengths == wanted_lengths


@pytest.mark.nightly
@torch.inference_mode()
def test_an_empty_batch(net):
    for method in METHODS:
        model = patch.compile(create(net, method), bucket=8, backend="eager")
        assert model(torch.randn(0, 3, 64, 64)).shape == (0, 5, 64, 64)


def test_a_widened_reduction_merges_the_same():
    reduction = Grouping.of_counts(torch.tensor([[0, 0, 1, 2], [0, 1, 0, 1]]), torch.tensor([3, 2]), torch.rand(2, 4))
    wide, x = reduction.widened(5), torch.randn(2, 4, 3)
    assert wide.sizes.shape == (2, 5) and wide.padding.sum(1).tolist() == [2, 3]
    assert torch.equal(wide.merge(x)[:, :3], reduction.merge(x)) and not wide.merge(x)[:, 3:].any()
    assert torch.equal(wide.unmerge(wide.merge(x)), reduction.unmerge(reduction.merge(x)))
    assert reduction.widened(1).sizes.shape == (2, 3)
