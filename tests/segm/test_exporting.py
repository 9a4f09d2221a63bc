"""Exported models give what PyTorch's give, for any number of images, with the reduction inside of the graph."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import patch
from segm.exporting import convert
from segm.merging import build_model
from tests.helpers import METHOD_OPTIONS, by_speed, different_images, options_for, with_parts

SIDE = 32
NET = {
    "backbone": "vit_tiny_patch16_384",
    "image_size": SIDE,
    "patch_size": 8,
    "d_model": 32,
    "n_heads": 2,
    "n_layers": 3,
    "n_cls": 5,
    "decoder": {"name": "mask_transformer", "n_layers": 1},
}
ROTARY = {"backbone": "vit_small_patch16_rope_224", "image_size": 32, "patch_size": 8, "n_layers": 2, "n_cls": 5}
ROTARY |= {"decoder": {"name": "linear"}}
INEXPRESSIBLE = ("atc", "clustvit", "ltmp")
BUDGETS = {"graph": 9, "algm": [13, 8], "ltmp": 8}


def small_segmenter(method=None, net=NET, **options):
    torch.manual_seed(0)
    model = build_model(net).eval()
    if method is None:
        return model
    with_parts(model.encoder, method)
    return patch.apply(model, method, **options)


def outputs_of(program, tmp_path):
    """The exported graph as a function of images."""
    program.save(tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    return lambda images: session.run(None, {"images": images.numpy()})[0]


def assert_same(call, own, side=SIDE, counts=(1, 2, 3)):
    """The same numbers for one image and for several that keep different numbers of tokens."""
    for n_images in counts:
        images = different_images(n_images, side)
        with torch.inference_mode():
            expected = call(images).numpy()
        found = own(images)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def sizes_inside(program):
    """All sizes that shape inference finds in a graph: numbers, and names where they vary."""
    graph = onnx.shape_inference.infer_shapes(program.model_proto, strict_mode=True).graph
    known = {one.name: one.type.tensor_type.shape for one in (*graph.value_info, *graph.output, *graph.input)}
    made = [name for node in graph.node for name in node.output if name]
    assert {*made} <= {*known}
    return {size.dim_param or size.dim_value for name in made for size in known[name].dim}


@pytest.mark.parametrize("method", by_speed([name for name in METHOD_OPTIONS if name not in INEXPRESSIBLE]))
def test_the_merge_is_inside_of_the_graph(method, tmp_path):
    model = small_segmenter(method, **options_for(method))
    program = convert(model, (SIDE, SIDE))
    assert_same(model.grid_logits, outputs_of(program, tmp_path))
    assert patch.reduction(model).counts.max() < 16
    assert "If" not in {node.op_type for node in program.model_proto.graph.node}


@pytest.mark.parametrize("method", by_speed(BUDGETS))
def test_a_budget_leaves_no_size_open(method, tmp_path):
    model = small_segmenter(method, **options_for(method) | {"tokens": BUDGETS[method]})
    program = convert(model, (SIDE, SIDE), batch_size=2)
    assert all(isinstance(size, int) for size in sizes_inside(program))
    assert_same(model.grid_logits, outputs_of(program, tmp_path), counts=(2,))


@pytest.mark.nightly
@pytest.mark.parametrize(("opset", "is_one"), by_speed([(18, False), (23, True)], slow=[(23, True)]))
def test_attention_is_one_operator_where_there_is_one(opset, is_one, tmp_path):
    model = small_segmenter()
    program = convert(model, (SIDE, SIDE), opset=opset)
    assert program.model.opset_imports[""] == opset
    assert ("Attention" in {node.op_type for node in program.model_proto.graph.node}) == is_one
    assert_same(model.grid_logits, outputs_of(program, tmp_path))


@pytest.mark.nightly
@pytest.mark.parametrize("batch_size", [None, 1])
def test_rotary_tables_are_constants(batch_size, tmp_path):
    model = small_segmenter("graph", ROTARY, tokens=9)
    program = convert(model, (SIDE, SIDE), batch_size=batch_size)
    assert not {"Sin", "Cos", "If"} & {node.op_type for node in program.model_proto.graph.node}
    assert_same(model.grid_logits, outputs_of(program, tmp_path), counts=(1, 3) if batch_size is None else (1,))
    if batch_size:
        assert all(isinstance(size, int) for size in sizes_inside(program))


@pytest.mark.parametrize("output", by_speed(["logits", "labels"]))
def test_outputs_at_the_size_of_the_image(output, tmp_path):
    model = small_segmenter()
    program = convert(model, (28, 36), output)  # no whole patches
    call = {"logits": model, "labels": lambda images: model(images).argmax(1)}[output]
    own = outputs_of(program, tmp_path)
    images = torch.randn(2, 3, 28, 36)
    with torch.inference_mode():
        expected = call(images).numpy()
    found = own(images)
    assert found.shape == expected.shape
    assert np.mean(np.isclose(found, expected, atol=1e-4)) > 0.999


@pytest.mark.parametrize("method", by_speed(INEXPRESSIBLE, slow=["ltmp"]))
def test_what_onnx_cannot_say_is_refused_in_one_line(method, capfd):
    model = small_segmenter(method, **options_for(method))
    with pytest.raises(ValueError, match="cannot be exported, choose a method with a fixed number of tokens") as error:
        convert(model, (SIDE, SIDE))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500
    assert capfd.readouterr() == ("", "")


@pytest.mark.nightly
@pytest.mark.parametrize("method", by_speed(["graph", "algm"], slow=["graph"]))
def test_torch_export_takes_a_model_with_a_budget(method):
    model = small_segmenter(method, **options_for(method) | {"tokens": BUDGETS[method]})
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    with torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(model, (torch.zeros(2, 3, SIDE, SIDE),), dynamic_shapes=shapes)
        for n_images in (1, 3):
            images = different_images(n_images, SIDE)
            torch.testing.assert_close(program.module()(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("decoder", by_speed(["linear_bn", "setr_naive", "eomt", "segvit"]))
def test_decoders_on_the_grid_and_queries(decoder, tmp_path):
    model = small_segmenter("graph", NET | {"decoder": {"name": decoder}}, **options_for("graph"))
    assert_same(model.grid_logits, outputs_of(convert(model, (SIDE, SIDE)), tmp_path))
