"""A method with a fixed number of tokens is one graph for `torch.compile` and `torch.export`."""

import pytest
import torch

import patch
from tests.families import FAMILIES
from tests.helpers import STATIC_OPTIONS, by_speed, different_images

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = ("vit", "eva", "Dinov2", "DINOv3ViT", "ViT", "DPT", "SiglipVision", "segmenter", "mask transformer")
SETTINGS = STATIC_OPTIONS
PAIRS = [(kind, setting) for kind in KINDS for setting in SETTINGS if setting in FAMILIES[kind].methods]
# A pair takes seconds: some methods, on models of every library, stand for the rest.
COMPILED = {("vit", "random"), ("mask transformer", "graph")}
COMPILED_SLOWLY = {("vit", "keymatch"), ("vit", "ltmp"), ("Dinov2", "tome"), ("segmenter", "algm")}
EXPORTED, EXPORTED_SLOWLY = {("vit", "graph")}, {("Dinov2", "graph"), ("mask transformer", "tome")}
TRAINED, TRAINED_SLOWLY = {("vit", "graph")}, {("Dinov2", "tome")}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(kind, setting, **options):
    return FAMILIES[kind].patched(setting, **SETTINGS[setting] | options)


class OneGraph:
    """A backend that runs what it is given, and counts."""

    def __init__(self):
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@torch.no_grad()
@pytest.mark.parametrize(("kind", "setting"), by_speed(PAIRS, COMPILED, COMPILED_SLOWLY))
def test_compiled_it_is_one_graph(kind, setting):
    model, backend = build(kind, setting, attention="proportional"), OneGraph()
    batches = [different_images(3), torch.randn(3, 3, 32, 32)]
    expected = [(tensors(model(images)), patch.reduction(model).lengths) for images in batches]
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for images, (right, lengths) in zip(batches, expected, strict=True):
        torch.testing.assert_close(tensors(compiled(images)), right, **CLOSE)
        assert patch.reduction(model).lengths == lengths
    assert backend.graphs == 1
    torch.testing.assert_close(tensors(model(batches[0])), expected[0][0], **CLOSE)  # eager again


@torch.no_grad()
@pytest.mark.parametrize(("kind", "setting"), by_speed(PAIRS, EXPORTED, EXPORTED_SLOWLY))
def test_exported_it_is_right_on_other_images(kind, setting):
    model = build(kind, setting)
    exported = torch.export.export(model, (torch.randn(3, 3, 32, 32),), strict=False).module()
    for images in (different_images(3), torch.randn(3, 3, 32, 32)):
        torch.testing.assert_close(tensors(exported(images)), tensors(model(images)), **CLOSE)


def tensors(output):
    return output if isinstance(output, torch.Tensor) else output.last_hidden_state


@pytest.mark.parametrize(("kind", "setting"), by_speed(PAIRS, TRAINED, TRAINED_SLOWLY))
def test_so_is_its_training(kind, setting):
    """Forward is one graph, and gradients are those of the eager model."""
    if setting in ("ltmp", "clustvit", "random"):
        pytest.skip("trains by chance, or not in this form")
    backend, images = OneGraph(), different_images(3)
    options = {"variant": "paper"} if setting == "dtem" else {}  # halves by position, not by chance
    gradients = []
    for compiles in (False, True):
        model = build(kind, setting, **options)
        model.train()
        call = torch.compile(model, fullgraph=True, backend=backend) if compiles else model
        tensors(call(images)).square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert backend.graphs == 1 and gradients[0]
    torch.testing.assert_close(gradients[1], gradients[0], atol=1e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(("kind", "setting"), by_speed([("vit", "graph"), ("mask transformer", "tome")]))
def test_inductor_gives_the_eager_result(kind, setting):
    model, images = build(kind, setting), different_images(3)
    expected = model(images)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.nightly
@torch.no_grad()
@pytest.mark.parametrize("kind", by_speed(["vit", "Dinov2", "segmenter"], slow=["segmenter"]))
def test_other_shapes_are_other_graphs_and_nothing_breaks(kind):
    model, backend = build(kind, "graph"), OneGraph()
    compiled = torch.compile(model, fullgraph=True, backend=backend, dynamic=False)
    for n in (1, 2, 3):
        images = different_images(n)
        torch.testing.assert_close(tensors(compiled(images)), tensors(model(images)), **CLOSE)
    assert backend.graphs == 3
