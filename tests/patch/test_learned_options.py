"""Options that shape learned parts come from the parts; and what a training pass has kept goes with its output."""

import copy
import gc
import weakref

import pytest
import torch
from torch.overrides import TorchFunctionMode

import patch
from segm.model.factory import create_segmenter
from tests.families import FAMILIES, MASKS, NET, segmenter
from tests.helpers import different_images

# method, options of the parts, options that switch them on, how the parts say what was chosen
SHAPED = [
    ("clustvit", {"clusters": 4}, {"layers": [2]}, "clusters", 3),
    ("clustvit", {"cluster_width": 24}, {"layers": [2]}, "cluster_width", 32),
    ("diffrate", {"granularity": 2}, {"learned": True}, "granularity", 4),
    ("fpet", {"layers": [3]}, {"adapter": True}, "layers", [1]),
]
LEARNED = {
    "dtem": {"r": 2},
    "clustvit": {"layers": [2]},
    "ltmp": {"learned": True},
    "diffrate": {"learned": True},
    "fpet": {"adapter": True},
}


def encoder_of(model):
    return getattr(model, "encoder", model)


@pytest.mark.parametrize("name", ["vit", "eva", "segmenter", "mask transformer"])
@pytest.mark.parametrize(("method", "shape", "options", "option", "other"), SHAPED)
def test_options_come_from_the_parts(name, method, shape, options, option, other):
    family, images = FAMILIES[name], different_images(3)
    model = family.build()
    patch.add_modules(encoder_of(model), method, **shape)
    shaped = options | shape
    right = copy.deepcopy(model)
    found = patch.options(patch.apply(model, method, **{k: v for k, v in options.items() if k != option}))[option]
    assert list(found) == shape[option] if isinstance(found, tuple) else found == shape[option]
    patch.apply(right, method, **shaped)  # what is given agrees
    with torch.inference_mode():
        torch.testing.assert_close(family.run(model, images), family.run(right, images))
    for twin in (copy.deepcopy(model), copy.deepcopy(patch.remove(model))):
        if not patch.is_patched(twin):
            patch.apply(twin, method, **{k: v for k, v in options.items() if k != option})
        assert patch.options(twin)[option] == found
    patch.remove(model)
    with pytest.raises(ValueError, match=option) as caught:
        patch.apply(model, method, **options | {option: other})
    assert "\n" not in str(caught.value) and not patch.is_patched(model)
    before = list(model.state_dict())
    patch.apply(model, method, **{k: v for k, v in options.items() if k != option})
    assert list(model.state_dict()) == before


def test_parts_that_are_not_in_use_do_not_count():
    """A layer or a granularity that the parts do not have is free as long as they do not choose."""
    model = FAMILIES["vit"].build()
    patch.add_modules(model, "fpet", layers=[3])
    assert patch.options(patch.apply(model, "fpet", layers=[1]))["layers"] == (1,)
    patch.remove(model)
    patch.add_modules(model, "diffrate", granularity=2)
    patch.apply(model, "diffrate", r=2, granularity=4)


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("clustvit", {"cluster_width": 0}, "cluster_width 0: give an integer from 1"),
        ("clustvit", {"clusters": 0}, "clusters 0: give an integer from 1"),
        ("diffrate", {"granularity": 0}, "granularity 0: give an integer from 1"),
        ("fpet", {"layers": [0]}, r"layers \[0\]: the encoder has layers 1 to"),
        ("fpet", {"layers": 99}, r"layers \[99\]: the encoder has layers 1 to"),
        ("fpet", {"clusters": 2}, "fpet takes no clusters: its options are layers"),
    ],
)
def test_parts_of_a_wrong_shape_are_refused(method, shape, message):
    model = FAMILIES["vit"].build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        patch.add_modules(model, method, **shape)
    assert list(model.state_dict()) == keys and not patch.has_modules(model, method)


def test_parts_that_are_in_use_unless_they_are_turned_off():
    """An option that enables them by default need not be given."""

    def add(encoder, blocks, width=4):
        return {"width": width}

    enabled = patch.Option(True, "Go by them.", flag={"--own": True, "--not-own": False})
    patch.register(
        "own", lambda step: None, modules=add, enabled_by="own", own=enabled, width=patch.Option(4, "Width.")
    )
    try:
        model = patch.add_modules(FAMILIES["vit"].build(), "own", width=3)
        assert patch.options(patch.apply(copy.deepcopy(model), "own"))["width"] == 3
        assert patch.options(patch.apply(copy.deepcopy(model), "own", own=False))["width"] == 4
        with pytest.raises(ValueError, match="width 4: the learned parts of own were built with 3"):
            patch.apply(model, "own", width=4)
    finally:
        del patch.METHODS["own"]


def test_a_segmenter_whose_network_names_its_parts():
    """As a run restores it: the parts stand in `net_kwargs`, the options of the patch say nothing."""

    def parts(encoder, reduction):
        options = dict(reduction)
        patch.add_modules(encoder, options.pop("name"), **options)

    model = create_segmenter(NET | {"reduction": {"name": "clustvit", "clusters": 5}}, parts=parts)
    patch.apply(model.train(), "clustvit", layers=[2])
    images, labels = different_images(2), torch.randint(0, 5, (2, 32, 32))
    loss = model(images).square().mean() + patch.loss(model, labels)
    loss.backward()
    assert patch.options(model)["clusters"] == 5
    assert model.encoder.clusterer.net[2].weight.grad.shape[0] == 6


class Box:
    """A tensor that a graph has saved."""

    def __init__(self, tensor):
        self.tensor = tensor


class Graphs(TorchFunctionMode):
    """Keeps weak references to what a graph saves, and to all tensors in it."""

    def __init__(self):
        super().__init__()
        self.references = []
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda box: box.tensor)

    def pack(self, tensor):
        box = Box(tensor.detach())  # an output would hold its own node
        self.references.append(weakref.ref(box))
        return box

    def __enter__(self):
        self.hooks.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.hooks.__exit__(*error)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, torch.Tensor) and one.grad_fn is not None:
                self.references.append(weakref.ref(one))
        return out

    def alive(self):
        """How many of them are left."""
        gc.collect()
        return sum(reference() is not None for reference in self.references)


def train_once(model, run, images, labels):
    with Graphs() as graphs:
        output = run(model, images)
        loss = output.square().mean() + patch.loss(model, labels)
        if loss.requires_grad:
            loss.backward()
    return graphs


CREATE = {
    "vit": FAMILIES["vit"].build,
    "eva": FAMILIES["eva"].build,
    "linear": segmenter,
    "mask transformer": lambda: segmenter(**MASKS),
}


@pytest.mark.parametrize("name", CREATE)
@pytest.mark.parametrize("method", [*LEARNED, "graph", "tome", "atc", "mctf", "dct"])
def test_the_graph_of_a_training_pass_goes_with_its_output(name, method):
    model, images, labels = CREATE[name](), different_images(2), torch.randint(0, 5, (2, 32, 32))
    run = FAMILIES["vit"].run if name in ("vit", "eva") else FAMILIES["segmenter"].run
    patch.add_modules(encoder_of(model), method)
    patch.apply(model.train(), method, **LEARNED.get(method, {}))
    graphs = train_once(model, run, images, labels)
    assert len(graphs.references) > 50
    assert graphs.alive() == 0
    assert patch.reduction(model) is None or patch.reduction(model).counts.shape == (2,)
    with Graphs() as graphs:  # thrown away before a loss was asked for
        run(model, images)
    assert graphs.alive() == 0


@pytest.mark.parametrize("method", [name for name in LEARNED if name != "fpet"])
def test_the_loss_can_be_asked_for_as_long_as_the_output_lives(method):
    """Also twice, after other passes in evaluation, and inside of another thread's life."""
    model, images, labels = segmenter(**MASKS), different_images(2), torch.randint(0, 5, (2, 32, 32))
    patch.add_modules(model.encoder, method)
    patch.apply(model.train(), method, **LEARNED[method])
    output = model(images)
    gc.collect()
    first, second = patch.loss(model, labels), patch.loss(model, labels)
    assert torch.equal(torch.as_tensor(first), torch.as_tensor(second))
    if method != "dtem":  # has no loss of its own
        assert first.requires_grad and first > 0
        (output.square().mean() + first).backward()
        own = patch.learned_parameters(model.encoder, method)
        assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in own)


@pytest.mark.parametrize("method", ["ltmp", "diffrate", "clustvit"])
def test_a_loss_without_a_living_pass_is_said_or_right(method):
    """After the output is gone there is nothing to learn from: the value, or one sentence, but no silent 0."""
    model, images, labels = segmenter(), different_images(2), torch.randint(0, 5, (2, 32, 32))
    patch.add_modules(model.encoder, method)
    patch.apply(model.train(), method, **LEARNED[method])
    output = model(images)
    expected = patch.loss(model, labels).detach()
    del output
    gc.collect()
    try:
        found = patch.loss(model, labels)
    except ValueError as error:
        assert "\n" not in str(error)
    else:
        torch.testing.assert_close(found.detach(), expected)


@pytest.mark.nightly
@torch.no_grad()
def test_compiled_code_takes_the_numbers_that_were_loaded():
    """No eager pass has read them since, and `eval()` was not called again."""
    family, images, lengths = FAMILIES["vit"], different_images(2), []
    models = [family.build() for _ in range(2)]
    for seed, model in enumerate(models, start=1):
        patch.add_modules(model, "diffrate", granularity=1)
        torch.manual_seed(seed)
        for parameter in patch.learned_parameters(model, "diffrate"):
            parameter.normal_(0, 2.0)
        patch.apply(model, "diffrate", learned=True)
    for model in models:
        family.run(model, images)
        lengths.append(patch.reduction(model).lengths)
    assert lengths[0] != lengths[1]
    models[0].load_state_dict(models[1].state_dict())
    torch._dynamo.reset()
    torch.compile(models[0], fullgraph=True, backend="eager")(images)
    assert patch.reduction(models[0]).lengths == lengths[1]
