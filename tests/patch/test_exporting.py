"""Exporters and tracers of PyTorch on patched models that are no Segmenters."""

import io
import logging

import numpy as np
import pytest
import torch

import patch
from tests.families import FAMILIES, hugging, vit
from tests.helpers import by_speed, different_images

BUDGETS = {"graph": {"layers": [1], "tokens": 9}, "algm": {"layers": [1, 2], "tokens": 9}}


@pytest.mark.parametrize("name", by_speed(["ViT", "Dinov2", "DINOv3ViT", "SiglipVision"], slow=["Dinov2"]))
def test_torch_export_takes_models_of_transformers(name):
    """The mask that the library makes while exporting is no mask of the user's."""
    family, images = FAMILIES[name], different_images(2)
    model = family.patched("tome", r=3)
    with torch.no_grad():
        program = torch.export.export(model, (images,), strict=False).module()
        torch.testing.assert_close(program(images / 2).last_hidden_state, family.run(model, images / 2))


@pytest.mark.parametrize("name", by_speed(["graph", "algm"]))
def test_no_scatter_has_more_indices_than_places(name, tmp_path):
    images, model = different_images(2), patch.apply(vit(), name, **BUDGETS[name])
    with torch.no_grad():
        own = model(images / 2)
    torch.testing.assert_close(exported(model, images, tmp_path)(images / 2), own, atol=1e-4, rtol=1e-4)
    check_scatters(tmp_path / "model.onnx")


def exported(model, images, tmp_path, opset=23):
    """What ONNX Runtime makes of a model's file."""
    runtime = pytest.importorskip("onnxruntime")
    logging.disable(logging.CRITICAL)
    with torch.no_grad():
        torch.onnx.export(model, (images,), tmp_path / "model.onnx", dynamo=True, **patch.onnx_options(opset))
    logging.disable(logging.NOTSET)
    session = runtime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(np.asarray(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]))


TOME = {"method": "tome", "layers": [2], "r": 3}
ONNX = {
    "vit": ("vit", 23, TOME),
    "vit, opset 18": ("vit", 18, TOME),
    "eva": ("eva", 23, TOME),
    "Dinov2": ("Dinov2", 23, TOME),
    "ViT": ("ViT", 23, {"method": "keymatch"}),
}


@torch.inference_mode(False)
@pytest.mark.parametrize("case", by_speed(list(ONNX), slow=["vit", "ViT"]))
def test_onnx_takes_merged_models(case, tmp_path):
    name, opset, options = ONNX[case]
    images, model = different_images(2), FAMILIES[name].patched(**options)
    run = exported(model, images, tmp_path, opset)
    with torch.no_grad():
        own = model(images / 2)
    own = own if isinstance(own, torch.Tensor) else own.last_hidden_state
    torch.testing.assert_close(run(images / 2), own, atol=1e-4, rtol=1e-4)
    check_scatters(tmp_path / "model.onnx")


def check_scatters(file):
    """TensorRT's parser refuses more indices than places."""
    onnx = pytest.importorskip("onnx")
    graph = onnx.shape_inference.infer_shapes(onnx.load(file)).graph
    shapes = {one.name: [axis.dim_value for axis in one.type.tensor_type.shape.dim] for one in graph.value_info}
    shapes |= {one.name: list(one.dims) for one in graph.initializer}
    scatters = [node for node in graph.node if node.op_type == "ScatterElements"]
    assert scatters
    for node in scatters:
        places, indices = (shapes[name] for name in node.input[:2])
        assert all(a >= b for a, b in zip(places, indices, strict=True)), (node.name, places, indices)


@pytest.mark.nightly
def test_a_half_file_runs_and_differs_by_rounding(tmp_path):
    images, model = different_images(2), patch.apply(vit(), "tome", layers=[2], r=3)
    with torch.no_grad():
        own = model(images)
    found = exported(model.half(), images.half(), tmp_path)(images.half())
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.float(), own, atol=0.05, rtol=0.05)


def test_what_cannot_trace_says_what_can():
    images, model = different_images(1), patch.apply(vit(), "tome", r=3)
    with pytest.raises(ValueError, match=r"torch.fx cannot trace a patched model: give the model to torch.export"):
        torch.fx.symbolic_trace(model)
    with pytest.raises(ValueError, match=r"torch.jit.script has no words for merges"):
        torch.jit.script(model)
    with pytest.raises(ValueError, match=r"dynamo=True, \*\*patch.onnx_options\(\)"):
        torch.onnx.export(model, (images,), io.BytesIO(), dynamo=False, opset_version=18)


@pytest.mark.nightly
@torch.inference_mode()
def test_one_graph_under_hooks_of_transformers():
    model, images = patch.apply(hugging(), "tome", r=3), different_images(2)
    expected = model(images, output_hidden_states=True).last_hidden_state
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    found = compiled(images, output_hidden_states=True)
    assert {state.shape for state in found.hidden_states} == {expected.shape}
