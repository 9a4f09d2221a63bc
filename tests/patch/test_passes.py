"""One pass is one object: threads, copies, replicas, hooks, failures and traces do not touch each other."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from threading import Barrier

import pytest
import timm
import torch

import patch
from segm.model.factory import create_segmenter
from tests.helpers import FEW, METHOD_OPTIONS, by_speed, different_images, few_and_all, options_for, with_parts

VITS = {"vit": "vit_tiny_patch16_224", "eva": "vit_small_patch16_dinov3"}
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
# Methods whose number of tokens does not depend on the image, and options that make it so.
STATIC = {
    "tome": {"r": 2},
    "keymatch": {"layers": [2, 3]},
    "tofu": {"r": 2},
    "dct": {"r": 2},
    **{
        name: METHOD_OPTIONS[name]
        for name in ("dtem", "pitome", "mctf", "crossget", "atc", "diffrate", "fpet", "expedit", "cubist")
    },
    "random": {},
    "graph": {"tokens": 7},
    "algm": {"layers": [1, 3], "tokens": [9, 6]},
}
DYNAMIC = {method: METHOD_OPTIONS[method] for method in ("graph", "algm", "mpm", "ltmp", "clustvit")}


def test_every_method_is_tested_here():
    assert patch.METHODS.keys() == METHOD_OPTIONS.keys() == {*STATIC, *DYNAMIC}


def vit(kind, **options):
    """A tiny ViT of timm for 16 patches, in evaluation mode."""
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5}
    model = timm.create_model(VITS[kind], **size | options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3) if parameter.ndim > 1 else None
    return model


def patched(model, method, **options):
    with_parts(getattr(model, "encoder", model), method)
    return patch.apply(model, method, **options_for(method, **options))


@pytest.fixture
def models(small_net):
    """name -> a function that makes a model: Segmenter, ViT, rotary ViT."""
    return {"segmenter": lambda: create_segmenter(small_net).eval()} | {
        kind: lambda kind=kind: vit(kind) for kind in VITS
    }


def in_threads(function, arguments):
    """function(one of the arguments) each, all started at once."""
    barrier = Barrier(len(arguments))

    def run(argument):
        barrier.wait()
        with torch.inference_mode():
            return function(argument)

    with ThreadPoolExecutor(len(arguments)) as pool:
        return list(pool.map(run, arguments))


def check_threads(model, n_calls, name):
    """Four threads, each with its own images: outputs and reductions as alone."""
    batches = [different_images(n) * scale for n, scale in ((1, 0.3), (2, 1.0), (2, 3.0), (3, 1.0))]

    def alone(images):
        found = model(images)
        merged = patch.reduction(model).lengths if patch.is_patched(model) else None
        return found, merged

    def often(images):
        calls = [alone(images) for _ in range(n_calls)]
        expected = calls[0]
        assert all(lengths == expected[1] for _, lengths in calls), name
        for found, _ in calls[1:]:
            torch.testing.assert_close(found, expected[0], **TOLERANCE)
        return expected

    with torch.inference_mode():
        expected = [alone(images) for images in batches]
    for (found, lengths), (wanted, wanted_lengths) in zip(in_threads(often, batches), expected, strict=True):
        torch.testing.assert_close(found, wanted, **TOLERANCE)
        assert lengths == wanted_lengths, name


@pytest.mark.parametrize("methods", few_and_all())
def test_threads(models, methods):
    for name, create in models.items():
        for method in methods:
            check_threads(patched(create(), method, attention="proportional"), 3, (name, method))
    check_threads(models["segmenter"](), 3, "unpatched")


@pytest.mark.nightly
def test_threads_often(models):
    check_threads(models["segmenter"](), 300, "unpatched")
    for method in METHOD_OPTIONS:
        check_threads(patched(models["segmenter"](), method), 300, method)


@torch.inference_mode()
def test_a_thread_sees_its_own_reduction(models):
    model = patched(models["segmenter"](), "graph")
    model(different_images(2))
    lengths = patch.reduction(model).lengths

    def ask(images):
        before = patch.reduction(model)
        model(images)
        return before, len(patch.reduction(model).lengths)

    assert in_threads(ask, [different_images(1), different_images(3)]) == [(None, 1), (None, 3)]
    assert patch.reduction(model).lengths == lengths


@pytest.mark.parametrize("methods", few_and_all())
@torch.inference_mode()
def test_copies_and_pickles_in_the_middle_of_life(models, methods):
    images = different_images(2)
    for name, create in models.items():
        for method in methods:
            model = patched(create(), method)
            expected, lengths = model(images), patch.reduction(model).lengths
            twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(copy.deepcopy(model))]
            patch.remove(model)
            for parameter in model.parameters():
                parameter.zero_()
            for twin in twins:
                assert patch.reduction(twin) is None and patch.method(twin) == method
                assert torch.equal(twin(images), expected), (name, method)
                assert patch.reduction(twin).lengths == lengths
                assert not patch.is_patched(patch.remove(twin))
                assert [type(m) for m in twin.modules()] == [type(m) for m in model.modules()]


@torch.inference_mode()
def test_options_of_a_copy_are_its_own(models):
    model = patched(models["segmenter"](), "graph")
    twin = copy.deepcopy(model)
    patch.set_threshold(twin, 1.0)
    for one in (model, twin):
        one(different_images(2))
    assert patch.options(model)["threshold"] == 0.2
    assert max(patch.reduction(model).lengths) < 16 and patch.reduction(twin).lengths == (16, 16)


@torch.inference_mode()
def test_a_copy_looks_at_its_own_hooks(models):
    model = patched(models["segmenter"](), "graph")
    twin, shapes, images = copy.deepcopy(model), [], different_images(3)
    for one in (model, twin):
        one.encoder.blocks[2].register_forward_hook(lambda block, inputs, output: shapes.append(output.shape[0]))
        one(images)
    assert shapes == [3, 3]


def replicate(module):
    """A replica as `nn.DataParallel` makes it: modules of their own, the same parameters as plain tensors."""
    replica = module._replicate_for_data_parallel()
    for name, parameter in module._parameters.items():
        if parameter is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, parameter.detach())
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicate(child)
    return replica


@pytest.mark.parametrize("methods", few_and_all())
def test_replicas_in_threads(models, methods):
    batches = [different_images(2) * scale for scale in (0.3, 1.0, 3.0)]
    for name, create in models.items():
        for method in methods:
            model = patched(create(), method)
            with torch.inference_mode():
                expected = [model(images) for images in batches]
            replicas = [replicate(model) for _ in batches]
            work = list(zip(replicas, batches, strict=True))
            found = in_threads(lambda one: [one[0](one[1]) for _ in range(3)][-1], work)
            torch.testing.assert_close(found, expected, **TOLERANCE, msg=f"{name} {method}")


@pytest.mark.parametrize("methods", few_and_all())
@torch.inference_mode()
def test_a_hook_that_calls_the_model(models, methods):
    """On other images, inside of every part of a pass; and the bare encoder."""
    outer, inner = different_images(3), different_images(2) * 0.5
    for name, create in models.items():
        for method in methods:
            model = patched(create(), method, attention="proportional")
            encoder = getattr(model, "encoder", model)
            expected, lengths = model(outer), patch.reduction(model).lengths
            inner_expected = model(inner), encoder.forward_features(inner)
            places = [encoder.patch_embed, encoder.blocks[1].attn, encoder.blocks[2].norm2, encoder.norm]
            if name == "segmenter":
                places += [model.decoder.blocks[0].mlp, model.decoder.decoder_norm]
            for place in places:
                found = []

                def call(*_, model=model, encoder=encoder, found=found):
                    if not found:
                        found.append(None)  # the calls inside come by here too
                        found[:] = [model(inner), encoder.forward_features(inner)]

                handle = place.register_forward_hook(call)
                torch.testing.assert_close(model(outer), expected, **TOLERANCE)
                handle.remove()
                torch.testing.assert_close(tuple(found), inner_expected, **TOLERANCE)
                assert patch.reduction(model).lengths == lengths, (name, method)


@pytest.mark.parametrize("methods", few_and_all())
@torch.inference_mode()
def test_a_pass_that_fails_leaves_no_trace(models, methods):
    images = different_images(3)
    for create in models.values():
        for method in methods:
            model = patched(create(), method)
            blocks = getattr(model, "encoder", model).blocks
            expected, reduction = model(images), patch.reduction(model)
            for index in range(3):

                def fail(*_):
                    raise KeyError("stop")

                handle = blocks[index].mlp.register_forward_pre_hook(fail)
                with pytest.raises(KeyError):
                    model(images)
                handle.remove()
                assert patch.reduction(model) is reduction
                own = torch.randn(1, 17, 32)
                assert blocks[2](own).shape == own.shape  # in no pass
            torch.testing.assert_close(model(images), expected, **TOLERANCE)


@torch.inference_mode()
def test_an_empty_batch(models):
    with pytest.raises(RuntimeError):  # timm's Eva cannot do it unpatched either
        models.pop("eva")()(torch.randn(0, 3, 32, 32))
    for name, create in models.items():
        for method in METHOD_OPTIONS:
            model = patched(create(), method, attention="proportional")
            for mode in (False, True):
                assert model.train(mode)(torch.randn(0, 3, 32, 32)).shape == create()(torch.randn(0, 3, 32, 32)).shape
            if name == "segmenter":
                assert model.predict(torch.randn(0, 3, 32, 32)).shape == (0, 32, 32)


@torch.inference_mode()
def test_a_mask_of_the_caller_is_refused(models):
    images, mask = different_images(2), torch.zeros(1, 1, 17, 17)
    for create, method in product(models.values(), METHOD_OPTIONS):
        model = patched(create(), method)
        encoder = getattr(model, "encoder", model)
        for arguments in ({"attn_mask": mask}, {"is_causal": True}):
            with pytest.raises(ValueError, match=r"no attn_mask and no is_causal.*patch\.remove") as caught:
                encoder.forward_features(images, **arguments)
            assert "\n" not in str(caught.value)
            if encoder is model:
                with pytest.raises(ValueError, match="no attn_mask"):
                    model(images, **arguments)


@torch.inference_mode()
def test_a_block_outside_of_any_pass_works_as_unpatched(models):
    x = torch.randn(2, 21, 32)
    mask = torch.zeros(21).masked_fill(torch.arange(21) > 9, float("-inf")).expand(21, 21)
    for name, create in models.items():
        model = create()
        block = getattr(model, "encoder", model).blocks[1]
        rope = {"rope": torch.randn(21 - 5, 32)} if name == "eva" else {}
        expected = [block(x, **rope), block(x, attn_mask=mask, **rope), block(x, is_causal=True, **rope)]
        for method in METHOD_OPTIONS:
            patched(model, method)
            model(different_images(2))
            found = [block(x, **rope), block(x, attn_mask=mask, **rope), block(x, is_causal=True, **rope)]
            assert all(map(torch.equal, found, expected)), (name, method)
            patch.remove(model)


@torch.inference_mode()
def test_traces_of_what_depends_on_the_picture_are_refused(models):
    images = different_images(1)
    for create in models.values():
        for method in DYNAMIC:
            model = patched(create(), method)
            for trace in (torch.jit.trace, lambda m, x: torch.export.export(m, (x,), strict=False)):
                with pytest.raises(ValueError, match=r"freeze how .* merges .*patch\.remove") as caught:
                    trace(model, images)
                assert "\n" not in str(caught.value)
            assert model(images).isfinite().all()


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@torch.inference_mode()
@pytest.mark.parametrize("chosen", by_speed(["segmenter", "all"], quick=["segmenter"]))
def test_traces_of_fixed_numbers_are_right_on_other_images(chosen, models):
    methods = STATIC if chosen == "all" else [name for name in FEW if name in STATIC]
    for name, create in models.items() if chosen == "all" else [(chosen, models[chosen])]:
        for method in methods:
            model, others = patched(create(), method, **STATIC[method]), different_images(2)
            traced = torch.jit.trace(model, torch.randn(2, 3, 32, 32), check_trace=False)
            with torch.jit.optimized_execution(False):
                for images in (others, torch.randn(2, 3, 32, 32)):
                    torch.testing.assert_close(traced(images), model(images), **TOLERANCE, msg=f"{name} {method}")


def check_export(create, names):
    for method in names:
        model, others = patched(create(), method, **STATIC[method]), different_images(2)
        with torch.no_grad():
            exported = torch.export.export(model, (torch.randn(2, 3, 32, 32),), strict=False).module()
            for images in (others, torch.randn(2, 3, 32, 32)):
                torch.testing.assert_close(exported(images), model(images), **TOLERANCE, msg=method)


def test_exports_of_fixed_numbers_are_right_on_other_images(models):
    check_export(models["segmenter"], ("tome",))


@pytest.mark.nightly
def test_exports_of_every_method(models):
    for create in models.values():
        check_export(create, STATIC)


@torch.no_grad()
def test_few_tokens_are_said_once_of_the_first_images(caplog):
    images, model = different_images(2), vit("vit")

    def said():
        lines = [record.getMessage() for record in caplog.records if record.name == "patch.track"]
        caplog.clear()
        return lines

    for method, options in (("tome", {"r": [8, 4, 1]}), ("graph", {"tokens": 3})):
        patch.apply(model, method, **options)
        torch.export.export(model, (images,))
        model(images[:0])
        assert not said()  # a graph says nothing, and no image has nothing to say
        copied = copy.deepcopy(model)
        for _ in range(2):
            model(images)
        (line,) = said()
        assert line.startswith(f"{method} leaves 3 of 16 patch tokens") and "\n" not in line
        copied(images)
        assert len(said()) == 1  # a model of its own
        patch.remove(model)
    patch.apply(model, "tome", r=[8, 4, 0])(images)  # a quarter
    assert not said()
