"""`remove` takes away what `apply` put there and nothing else, whatever else a model is."""

import copy
import pickle

import pytest
import torch
import torch.distributed
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

import patch
from tests.families import FAMILIES
from tests.helpers import METHOD_OPTIONS, by_speed, different_images, right_or_refused

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
OWN = ("merging", "neighbors", "places", "last", "index", "learned_parts", "patch_sides", "ends", "shown")
OWN += ("record", "patched", "track", "layout", "look", "n_around", "merges_at", "tracing")


def traces(model):
    """Class, names and values of the attributes, and what hangs on every module."""
    return [
        (type(m), {name: id(value) for name, value in vars(m).items()}, len(m._forward_hooks)) for m in model.modules()
    ]


def kinds(model):
    """The same without identity, which copies do not keep."""
    return [(type(m), sorted(vars(m))) for m in model.modules()]


@torch.inference_mode()
@pytest.mark.parametrize("name", by_speed(FAMILIES, slow=["vit", "Dinov2", "mask transformer"]))
def test_remove_restores_everything(name):
    family, images = FAMILIES[name], different_images(3)
    for method in family.methods:
        model = family.build()
        if family.learns:
            patch.add_modules(getattr(model, "encoder", model), method)
        before, keys, expected = traces(model), list(model.state_dict()), family.run(model, images)
        names = [name for name, _ in model.named_modules()]
        family.run(patch.apply(model, method, **METHOD_OPTIONS[method]), images)
        assert list(model.state_dict()) == keys and [name for name, _ in model.named_modules()] == names
        twins = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        assert traces(patch.remove(model)) == before, (name, method)
        torch.testing.assert_close(family.run(model, images), expected, rtol=0, atol=0)
        for twin in twins:
            assert patch.is_patched(twin) and not patch.is_patched(patch.remove(twin))
            assert kinds(twin) == kinds(model) and list(twin.state_dict()) == keys
            torch.testing.assert_close(family.run(twin, images), expected, rtol=0, atol=0)


@torch.inference_mode()
@pytest.mark.parametrize("name", FAMILIES)
def test_attributes_of_the_models_own_are_kept(name):
    """Whatever names a patch uses: those of today, of tomorrow, and in every module."""
    family, images = FAMILIES[name], different_images(3)
    for method in ("graph", "tome"):
        expected = family.run(family.patched(method), images)
        model = family.build()
        for module in model.modules():
            for attribute in OWN:
                if not hasattr(module, attribute):
                    setattr(module, attribute, f"own {attribute}")
        before = traces(model)
        assert not patch.is_patched(model)
        with pytest.raises(ValueError, match="not patched"):
            patch.reduction(model)
        patch.apply(model, method, **METHOD_OPTIONS[method])
        torch.testing.assert_close(family.run(model, images), expected, **CLOSE)
        assert all(getattr(module, "index", None) == "own index" for module in family.blocks(model))
        twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        torch.testing.assert_close(family.run(twin, images), expected, **CLOSE)
        assert traces(patch.remove(model)) == before
        assert kinds(patch.remove(twin)) == kinds(model)
        assert {vars(m).get("merging") for m in twin.modules()} == {"own merging"}


@torch.inference_mode()
@pytest.mark.parametrize("name", ["vit", "Dinov2", "segmenter"])
def test_so_are_modules_and_parameters_of_these_names(name):
    family, images = FAMILIES[name], different_images(3)
    expected = family.run(family.patched("graph"), images)
    model = family.build()
    for module in list(model.modules()):
        if module is model or module in list(family.blocks(model)):
            module.merging, module.index = nn.Linear(2, 2), nn.Parameter(torch.zeros(1))
            module.register_buffer("places", torch.zeros(3))
    before, keys = traces(model), list(model.state_dict())
    family.patched("graph", model=model)
    torch.testing.assert_close(family.run(model, images), expected, **CLOSE)
    assert list(model.state_dict()) == keys and isinstance(model.merging, nn.Linear)
    assert traces(patch.remove(model)) == before


@torch.inference_mode()
def test_learned_parts_and_an_own_attribute_of_that_name():
    model = FAMILIES["vit"].build()
    model.learned_parts = {"mine": 1}
    patch.add_modules(model, "dtem")
    assert patch.has_modules(model, "dtem") and len(patch.learned_parameters(model, "dtem")) == 6
    assert not patch.has_modules(model, "ltmp") and model.learned_parts == {"mine": 1}


@pytest.fixture
def mesh():
    """A device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def shard(name, model, mesh):
    for block in FAMILIES[name].blocks(model):
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


SHARDED = ["Dinov2", "DINOv3ViT", "SiglipVision", "mmseg", "segmenter", "mask transformer"]


@pytest.mark.parametrize("name", SHARDED)
def test_a_sharded_model_trains_as_one_that_is_not(name, mesh):
    family, images = FAMILIES[name], different_images(3)
    for method in ("graph", "tome"):
        model = family.patched(method)
        model.train()  # mmengine's returns nothing
        torch.manual_seed(1)  # DINOv3 shifts positions by chance
        right = family.run(model, images)
        right.square().mean().backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        shard(name, model, mesh)
        torch.manual_seed(1)
        found = family.run(model, images)
        torch.testing.assert_close(found, right, **CLOSE)
        found.square().mean().backward()
        for key, parameter in model.named_parameters():
            if key in expected:
                torch.testing.assert_close(parameter.grad.full_tensor(), expected[key], atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", SHARDED)
def test_remove_after_fully_shard(name, mesh):
    """The model is then a sharded one that is not patched."""
    family, images = FAMILIES[name], different_images(3)
    plain = family.run(family.build(), images)
    model = shard(name, family.patched("tome"), mesh)
    family.run(model, images)
    assert patch.is_patched(model)
    assert patch.remove(model) is model and not patch.is_patched(model)
    assert isinstance(model, FSDPModule) and all(isinstance(block, FSDPModule) for block in family.blocks(model))
    expected = kinds(shard(name, family.build(), mesh))  # whose classes FSDP may have made anew
    assert [(cls.__name__, cls.__bases__, names) for cls, names in kinds(model)] == [
        (cls.__name__, cls.__bases__, names) for cls, names in expected
    ]
    torch.testing.assert_close(family.run(model, images), plain, **CLOSE)


@pytest.mark.parametrize("name", SHARDED)
def test_apply_after_fully_shard(name, mesh):
    family, images = FAMILIES[name], different_images(3)
    right, plain = family.run(family.patched("tome"), images), family.run(family.build(), images)
    model = shard(name, family.build(), mesh)
    classes = [type(m) for m in model.modules()]
    right_or_refused(lambda: family.run(family.patched("tome", model=model), images), right, match="fully_shard|FSDP")
    patch.remove(model)
    assert [type(m) for m in model.modules()] == classes
    torch.testing.assert_close(family.run(model, images), plain, **CLOSE)
