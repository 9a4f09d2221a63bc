"""The command that exports, and the commands that take what it wrote."""

import cv2
import numpy as np
import onnx
import pytest
import torch
import yaml

from segm import export_onnx, inference, test
from segm.eval import miou
from segm.onnx_model import KEY, OnnxModel, Record, open_run
from segm.run import Run

CPU = ["--device", "cpu"]
FEW = ["--max-images", 2]


@pytest.fixture
def photographs(tmp_path):
    folder = tmp_path / "photographs"
    folder.mkdir()
    for index, size in enumerate(((40, 56), (32, 32))):
        picture = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{index}.png"), picture)
    return folder


def maps_in(folder):
    return {file.name: cv2.imread(str(file), cv2.IMREAD_UNCHANGED) for file in sorted(folder.glob("?.png"))}


@pytest.mark.nightly
def test_an_exported_run_predicts_and_scores_like_the_run(shapes_run, photographs, tmp_path, call, refused):
    merging = ["--patch-type", "graph", "--tokens", 0.5]
    out = call(export_onnx, shapes_run, *merging, *FEW)
    file = shapes_run / "model.onnx"
    assert "PyTorch, pure" in out and "PyTorch, graph" in out and "ONNX Runtime, float32" in out and "100.00" in out
    call(inference, shapes_run, *merging, "-i", photographs, "-o", tmp_path / "torch", *CPU)
    call(inference, file, "-i", photographs, "-o", tmp_path / "onnx", *CPU)
    expected, found = maps_in(tmp_path / "torch"), maps_in(tmp_path / "onnx")
    assert expected.keys() == found.keys() == {"0.png", "1.png"}
    assert np.mean([(expected[name] == found[name]).mean() for name in found]) > 0.999
    assert call(test, file, *FEW, *CPU) == call(test, shapes_run, *merging, *FEW, *CPU)
    assert "mean_iou" in call(miou, file, "shapes", "--singlescale", *FEW, *CPU)
    call(miou, shapes_run, "shapes", *merging, *FEW, *CPU)
    exported, own = yaml.safe_load((shapes_run / "scores_ss.yml").read_text())
    assert exported["conditions"] == own["conditions"] | {"checkpoint": "model.onnx"}
    assert own["conditions"]["patch_type"] == "graph" and exported["mean_iou"] == own["mean_iou"]
    run = open_run(file, device=torch.device("cpu"), merging={})
    assert (run.method, run.options["tokens"]) == ("graph", 0.5)
    error = refused(test, file, "--patch-type", "pure", *CPU)
    assert "exported" in error and "leave the options out" in error
    assert Record.parse(onnx.load(file).metadata_props[-1].value).merging["patch_type"] == "graph"


@pytest.mark.nightly
def test_int8_files_lie_beside_the_exported_one_and_run(shapes_run, photographs, tmp_path, call):
    out = call(export_onnx, shapes_run, "--int8", "--out", tmp_path / "a.onnx", "--images", photographs)
    files = sorted(file.name for file in tmp_path.glob("*.onnx"))
    assert files == ["a.onnx", "a_int8_dynamic.onnx", "a_int8_static.onnx"] and "mIoU" not in out
    sizes = [(tmp_path / name).stat().st_size for name in files]
    assert max(sizes[1:]) < sizes[0]
    for name in files[1:]:
        kinds = {node.op_type for node in onnx.load(tmp_path / name).graph.node}
        assert kinds & {"MatMulInteger", "DynamicQuantizeMatMul", "QLinearMatMul", "QuantizeLinear"}
        assert any(one.key == KEY for one in onnx.load(tmp_path / name).metadata_props)
        call(inference, tmp_path / name, "-i", photographs, "-o", tmp_path / name.removesuffix(".onnx"), *CPU)


@pytest.mark.nightly
@pytest.mark.parametrize(("method", "options"), [("tome", {"r": 2}), ("graph", {"tokens": 12}), ("graph", {})])
def test_files_in_float16_run_and_merge_by_similarities_in_float32(shapes_run, tmp_path, method, options):
    run, images = Run.load(shapes_run, device="cpu", patch_type=method, **options), torch.randn(2, 3, 32, 32)
    export_onnx.export(run, tmp_path / "a.onnx")
    export_onnx.export(run, tmp_path / "b.onnx", float16=True)
    expected, found = (OnnxModel(tmp_path / name).run(images) for name in ("a.onnx", "b.onnx"))
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.02
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "b.onnx")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    weights = [one.data_type for one in graph.initializer if np.prod(one.dims) > 64]
    assert {*weights} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    products = [kinds.get(node.output[0]) for node in graph.node if node.op_type in ("MatMul", "Gemm", "ReduceSum")]
    assert onnx.TensorProto.FLOAT in products  # similarities; all others are in float16
    assert products.count(onnx.TensorProto.FLOAT16) > products.count(onnx.TensorProto.FLOAT)


@pytest.mark.nightly
def test_a_graph_of_labels_is_no_model_for_windows(shapes_run, photographs, tmp_path, call, refused):
    call(export_onnx, shapes_run, "--output", "labels", "--out", tmp_path / "a.onnx", "--batch-size", 2, *FEW)
    error = refused(inference, tmp_path / "a.onnx", "-i", photographs, "-o", tmp_path / "b", *CPU)
    assert "--output scores" in error


@pytest.mark.nightly
def test_a_fixed_number_of_images_is_filled_up(shapes_run, tmp_path, call):
    out = call(export_onnx, shapes_run, "--batch-size", 2, "--out", tmp_path / "a.onnx", "--max-images", 4)
    assert "mIoU" in out and "images 2 × 3 × 32 × 32" in out
    model = OnnxModel(tmp_path / "a.onnx")
    images = torch.randn(3, 3, 32, 32)
    found = model(images)
    torch.testing.assert_close(found, torch.cat([model(images[:1]), model(images[1:])]), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_images_that_are_no_whole_patches(shapes_run, tmp_path, call):
    """Logits per patch cover the padded image, in PyTorch and in the file."""
    call(export_onnx, shapes_run, "--im-size", 28, "--out", tmp_path / "a.onnx", *FEW)
    images = torch.randn(2, 3, 28, 28)
    with torch.inference_mode():
        expected = Run.load(shapes_run, device="cpu").model(images)
    torch.testing.assert_close(OnnxModel(tmp_path / "a.onnx")(images), expected, atol=1e-4, rtol=1e-4)


def test_wrong_files_are_named(shapes_run, photographs, tmp_path, refused, monkeypatch):
    read = ["-i", photographs, "-o", tmp_path / "b", *CPU]
    assert "not found" in refused(inference, tmp_path / "none.onnx", *read)
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(b"no model")
    assert "cannot open" in refused(inference, damaged, *read)
    x = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, [1])
    y = onnx.helper.make_tensor_value_info("output", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["images"], ["output"])], "other", [x], [y])
    other = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(other, tmp_path / "other.onnx")
    assert "was not exported" in refused(inference, tmp_path / "other.onnx", *read)
    monkeypatch.setattr(export_onnx, "find_spec", lambda name: None)
    assert "pip install 'g2tm[onnx]'" in refused(export_onnx, shapes_run, *FEW)


@pytest.mark.nightly
def test_images_of_another_size_are_refused(shapes_run, tmp_path, call):
    call(export_onnx, shapes_run, "--out", tmp_path / "a.onnx", *FEW)
    model = OnnxModel(tmp_path / "a.onnx")
    assert model(torch.zeros(3, 3, 32, 32)).shape == (3, 11, 32, 32)
    with pytest.raises(ValueError, match="33 × 32 pixels, the exported model takes 32 × 32"):
        model(torch.zeros(1, 3, 33, 32))
