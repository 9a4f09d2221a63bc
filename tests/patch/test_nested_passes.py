"""Passes are a stack in every family: what happens inside of one, or is left half done, touches no other."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

import patch
from tests.families import FAMILIES
from tests.helpers import different_images

CLOSE = {"atol": 5e-5, "rtol": 1e-5}  # outputs of EoMT are about 30
QUICK = ("graph", "tome")
HUGGING = {  # the part in front of the blocks, and what runs the blocks on its output
    "Dinov2": lambda m, x: m.encoder(x).last_hidden_state,
    "ViT": lambda m, x: run_layers(m.layers if hasattr(m, "layers") else m.encoder.layer, x),
    "SiglipVision": lambda m, x: getattr(m, "vision_model", m).encoder(inputs_embeds=x).last_hidden_state,
}


def run_layers(layers, x):
    for layer in layers:
        x = layer(x)
    return x


def embeddings_of(model):
    return getattr(model, "vision_model", model).embeddings


def parts_of(name, model):
    """One module of each kind inside of a block, the block itself, and what stands in front of the blocks."""
    block = list(FAMILIES[name].blocks(model))[1]
    inside = list(block.children())
    first = next(m for m in model.modules() if isinstance(m, torch.nn.Conv2d))
    return [first, inside[0], inside[-1], block]


def check_calls_inside(name, method):
    family = FAMILIES[name]
    outer, inner = different_images(3), different_images(2) * 0.7
    model = family.patched(method)
    expected, lengths = family.run(model, outer), patch.reduction(model).lengths
    expected_inside = family.run(model, inner)
    for part in parts_of(name, model):
        found = []

        def call(*_, found=found):
            if not found:
                found.append(None)  # the call inside comes by here too
                found[0] = family.run(model, inner)

        handle = part.register_forward_hook(call)
        torch.testing.assert_close(family.run(model, outer), expected, **CLOSE, msg=f"{name} {method} {type(part)}")
        handle.remove()
        torch.testing.assert_close(found[0], expected_inside, **CLOSE)
        assert patch.reduction(model).lengths == lengths, (name, method)


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_hook_that_calls_the_model_on_other_images(name):
    for method in QUICK:
        check_calls_inside(name, method)


@pytest.mark.nightly
@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_hook_that_calls_the_model_in_every_method(name):
    for method in FAMILIES[name].methods:
        check_calls_inside(name, method)


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_call_inside_of_a_call_that_fails_ends_with_it(name):
    """The inner pass raises, the hook catches it, and the outer pass goes on."""
    family, images, depth = FAMILIES[name], different_images(3), []
    model = family.patched("graph")
    expected = family.run(model, images)

    def call(*_):
        depth.append(None)
        if len(depth) == 1:
            with pytest.raises(KeyError):
                family.run(model, images[:2])
        elif len(depth) == 2:
            raise KeyError("stop")

    handle = list(family.blocks(model))[2].register_forward_pre_hook(call)
    torch.testing.assert_close(family.run(model, images), expected, **CLOSE)
    handle.remove()
    assert len(depth) == 2 and len(patch.reduction(model).lengths) == 3


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_pass_that_raises_leaves_nothing_behind(name):
    """Neither an open pass, in which a block by itself would merge, nor another last reduction."""
    family, images = FAMILIES[name], different_images(3)
    for method in QUICK:
        model = family.patched(method)
        expected, reduction = family.run(model, images), patch.reduction(model)
        for index in range(3):
            part = list(list(family.blocks(model))[index].children())[-1]

            def fail(*_):
                raise KeyError("stop")

            handle = part.register_forward_pre_hook(fail)
            with pytest.raises(KeyError):
                family.run(model, images)
            handle.remove()
            assert patch.reduction(model) is reduction
            check_blocks_alone(name, model)
        torch.testing.assert_close(family.run(model, images), expected, **CLOSE)


def check_blocks_alone(name, model):
    """A block outside of any pass gives back as many tokens as it gets."""
    x = torch.randn(2, FAMILIES[name].n_prefix + 16, 32)
    rope = {}
    if name == "eva":
        rope = {"rope": torch.randn(16, 32)}
    if name == "DINOv3ViT":
        rope = {"position_embeddings": (torch.randn(16, 16), torch.randn(16, 16))}
    for block in FAMILIES[name].blocks(model):
        out = block(x, **rope)
        assert (out[0] if isinstance(out, tuple) else out).shape == x.shape


@torch.inference_mode()
@pytest.mark.parametrize("name", HUGGING)
def test_embeddings_alone_leave_nothing_behind(name):
    family, images = FAMILIES[name], different_images(3)
    for method in QUICK:
        model = family.patched(method)
        expected, reduction = family.run(model, images), patch.reduction(model)
        embeddings_of(model)(images[:2])
        check_blocks_alone(name, model)
        assert patch.reduction(model) is reduction
        embeddings_of(model)(images[:1])
        torch.testing.assert_close(family.run(model, images), expected, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("name", HUGGING)
def test_blocks_by_hand_are_the_same_for_every_image(name):
    """Two images are treated alike, in any order, whether or not blocks merge where a caller runs the parts himself."""
    family, images = FAMILIES[name], different_images(2)
    model = family.patched("tome")
    one_by_one = [HUGGING[name](model, embeddings_of(model)(image[None])) for image in images]
    embedded = [embeddings_of(model)(image[None]) for image in images]
    for found, expected in zip([HUGGING[name](model, one) for one in embedded], one_by_one, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def in_threads(*functions):
    """Their results; all start at once."""
    barrier = Barrier(len(functions))

    def run(function):
        barrier.wait()
        with torch.inference_mode():
            return function()

    with ThreadPoolExecutor(len(functions)) as pool:
        return list(pool.map(run, functions))


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_threads_do_not_meet(name):
    family = FAMILIES[name]
    for method in QUICK:
        model = family.patched(method)
        batches = [different_images(n) * scale for n, scale in ((1, 0.3), (2, 1.0), (3, 3.0))]
        expected = [family.run(model, images) for images in batches]

        def repeat(images, model=model):
            for _ in range(3):
                found = family.run(model, images)
            return found, len(patch.reduction(model).lengths)

        for index, (found, n) in enumerate(in_threads(*(lambda x=x: repeat(x) for x in batches))):
            torch.testing.assert_close(found, expected[index], **CLOSE)
            assert n == len(batches[index])


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit", "Dinov2", "segmenter"])
def test_a_replaced_merge_is_that_of_the_calling_thread(name):
    family, images = FAMILIES[name], different_images(3)
    model = family.patched("graph", layers=[1], threshold=0.2)
    own = patch.find("graph").merge
    expected, others, opened, closed = family.run(model, images), [], Barrier(2), Barrier(2)

    def replace():
        with patch.replaced_merge(model, lambda step: others.append(step.layer) or own(step)):
            opened.wait(10)
            family.run(model, images)
            closed.wait(10)
        family.run(model, images)
        return others

    def look_on():
        opened.wait(10)
        found = family.run(model, images)
        closed.wait(10)
        return found

    calls, found = in_threads(replace, look_on)
    assert calls == [1]
    torch.testing.assert_close(found, expected, **CLOSE)


@torch.inference_mode()
def test_replaced_merges_are_nested_and_end_with_an_error():
    family, images, calls = FAMILIES["vit"], different_images(2), []
    model = family.patched("graph", layers=[1])
    own = patch.find("graph").merge

    def noted(name):
        return lambda step: calls.append(name) or own(step)

    with pytest.raises(KeyError), patch.replaced_merge(model, noted("outer")):
        with patch.replaced_merge(model, noted("inner")):
            family.run(model, images)
        family.run(model, images)
        raise KeyError("stop")
    family.run(model, images)
    assert calls == ["inner", "outer"] and patch.method(model) == "graph"
