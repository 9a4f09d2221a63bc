"""The command that exports, and the commands that take what it wrote."""

import cv2
import numpy as np
import onnx
import pytest
import torch
import yaml

from segm import export_onnx, exported, exporting, inference, tensorrt, test
from segm.eval import miou
from segm.exported import KEY, ExportedModel, Record, open_run
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
    rows = ("PyTorch, float32, pure", "PyTorch, float32, graph", "ONNX Runtime, float32, graph")
    assert [row in out for row in rows] == [True] * 3 and out.count("100.00") >= 3
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
    exporting.export(run, tmp_path / "a.onnx")
    exporting.export(run, tmp_path / "b.onnx", float16=True)
    expected, found = (ExportedModel(tmp_path / name).run(images) for name in ("a.onnx", "b.onnx"))
    assert found.dtype == torch.float32 and 0 < (found - expected).abs().max() < 0.02
    graph = onnx.shape_inference.infer_shapes(onnx.load(tmp_path / "b.onnx")).graph
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.value_info}
    weights = [one.data_type for one in graph.initializer if np.prod(one.dims) > 64]
    assert {*weights} <= {onnx.TensorProto.FLOAT16, onnx.TensorProto.INT64}
    products = [kinds.get(node.output[0]) for node in graph.node if node.op_type in ("MatMul", "Gemm", "ReduceSum")]
    assert onnx.TensorProto.FLOAT in products  # similarities; all others are in float16
    assert products.count(onnx.TensorProto.FLOAT16) > products.count(onnx.TensorProto.FLOAT)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [pytest.param(None, marks=pytest.mark.nightly), 1])
def test_both_kinds_of_int8_hold_their_weights_in_int8(shapes_run, tmp_path, batch_size):
    """Also of a fixed batch, where products with a bias would become operators that stay in float32."""
    run, images = Run.load(shapes_run, device="cpu"), torch.randn(4, 3, 32, 32)
    exporting.export(run, tmp_path / "a.onnx", batch_size=batch_size)
    n_weights = [sum(np.prod(one.dims) for one in onnx.load(tmp_path / "a.onnx").graph.initializer)]
    expected = run.model.grid_logits(images)
    for name, calibration in (("dynamic", None), ("static", images.split(1))):
        exporting.quantize(tmp_path / "a.onnx", tmp_path / f"{name}.onnx", calibration)
        weights = onnx.load(tmp_path / f"{name}.onnx").graph.initializer
        in_int8 = sum(np.prod(one.dims) for one in weights if one.data_type == onnx.TensorProto.INT8)
        assert in_int8 > 0.8 * n_weights[0]
        found = ExportedModel(tmp_path / f"{name}.onnx").run(images)
        assert 0 < (found - expected).abs().max() < 0.2 * expected.abs().max()


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["pure", "keymatch", "graph"])
def test_openvino_gives_what_pytorch_gives(shapes_run, tmp_path, method):
    merging = {} if method == "pure" else {"patch_type": method, "tokens": 0.5}
    run, images = Run.load(shapes_run, device="cpu", **merging), torch.randn(2, 3, 32, 32)
    exporting.export(run, tmp_path / "a.onnx")
    with torch.inference_mode():
        expected = run.model.grid_logits(images)
    model = ExportedModel(tmp_path / "a.onnx", runtime="openvino")
    torch.testing.assert_close(model.run(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.run(images[:1]), expected[:1], atol=1e-4, rtol=1e-4)
    assert model.record == ExportedModel(tmp_path / "a.onnx").record and model.batch_size is None


@pytest.mark.nightly
def test_commands_take_the_runtime_of_an_exported_file(shapes_run, photographs, tmp_path, call):
    exporting.export(Run.load(shapes_run, device="cpu"), shapes_run / "a.onnx")
    file = shapes_run / "a.onnx"
    assert call(test, file, "--runtime", "openvino", *FEW, *CPU) == call(test, shapes_run, *FEW, *CPU)
    call(inference, file, "--runtime", "openvino", "--amp", "-i", photographs, "-o", tmp_path / "b", *CPU)
    assert {*maps_in(tmp_path / "b")} == {"0.png", "1.png"}
    call(miou, file, "shapes", "--singlescale", "--runtime", "openvino", "--amp", *FEW, *CPU)
    (entry,) = yaml.safe_load((shapes_run / "scores_ss.yml").read_text())
    assert entry["conditions"]["precision"] == "openvino-bfloat16"


@pytest.mark.nightly
def test_runtimes_are_compared_with_and_without_merging(shapes_run, tmp_path, call):
    options = ["--patch-type", "keymatch", "--tokens", 0.5, "--int8", "--with-pure", "--max-images", 4]
    out = call(
        export_onnx, shapes_run, *options, "--runtime", "onnxruntime,openvino,aotinductor", "--out", tmp_path / "a.onnx"
    )
    for runtime in ("ONNX Runtime", "OpenVINO", "AOTInductor"):
        for method in ("pure", "keymatch"):
            assert f"{runtime}, float32, {method}" in out
    assert "OpenVINO, int8, static, pure" in out and "OpenVINO, int8, dynamic" not in out
    assert (tmp_path / "a.pt2").is_file() and "mIoU" in out
    assert call(test, tmp_path / "a.pt2", *FEW, *CPU) == call(test, tmp_path / "a.onnx", *FEW, *CPU)


@pytest.mark.nightly
@pytest.mark.parametrize("batch_size", [None, 2])
def test_a_compiled_package_gives_what_pytorch_gives(shapes_run, tmp_path, batch_size):
    run = Run.load(shapes_run, device="cpu", patch_type="keymatch", tokens=0.5)
    images = torch.randn(3, 3, 32, 32)
    exporting.package(run, tmp_path / "a.pt2", batch_size=batch_size)
    model = ExportedModel(tmp_path / "a.pt2")
    with torch.inference_mode():
        torch.testing.assert_close(model.run(images), run.model.grid_logits(images), atol=1e-4, rtol=1e-4)
    assert model.record.merging["patch_type"] == "keymatch" and model.batch_size == batch_size


@pytest.mark.slow
def test_a_package_of_a_threshold_is_refused_with_what_to_do(shapes_run, tmp_path):
    run = Run.load(shapes_run, device="cpu", patch_type="graph", threshold=0.9)
    with pytest.raises(ValueError, match="choose a method with a fixed number of tokens"):
        exporting.package(run, tmp_path / "a.pt2")
    assert not [*tmp_path.glob("*.pt2*")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "budget"), [("keymatch", {"tokens": 0.5}), pytest.param("tome", {"r": 2}, marks=pytest.mark.nightly)]
)
def test_a_graph_with_a_budget_is_one_for_tensorrt(shapes_run, tmp_path, method, budget):
    run = Run.load(shapes_run, device="cpu", patch_type=method, **budget)
    exporting.export(run, tmp_path / "a.onnx", batch_size=1)
    assert "fixed shapes, no If, Loop or Scan" in tensorrt.check(tmp_path / "a.onnx")
    exporting.export(run, tmp_path / "b.onnx")
    with pytest.raises(ValueError, match=r"shapes vary, first that of images \(--batch-size N"):
        tensorrt.check(tmp_path / "b.onnx")


def test_what_tensorrt_would_refuse_is_named(tmp_path):
    def refusal(*nodes, constants=(), opset=18):
        x = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [4, 8])
        y = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [4, 8])
        held = [onnx.numpy_helper.from_array(np.array(value), name) for name, value in constants]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node(*one, **more) for *one, more in nodes], "g", [x], [y], held
        )
        own = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid("com.microsoft", 1)]
        onnx.save(onnx.helper.make_model(graph, opset_imports=own, ir_version=10), tmp_path / "a.onnx")
        try:
            return tensorrt.check(tmp_path / "a.onnx")
        except ValueError as error:
            return str(error)

    assert "1 kinds of operators, all in its list" in refusal(("Relu", ["x"], ["y"], {}))
    assert "operator FusedMatMul is not" in refusal(("FusedMatMul", ["x"], ["y"], {"domain": "com.microsoft"}))
    assert "operator Det is not in its list" in refusal(("Det", ["x"], ["y"], {}))
    assert "opset 8 is not within 9 to 24" in refusal(("Relu", ["x"], ["y"], {}), opset=8)
    topk = ("TopK", ["x", "k"], ["y", "i"], {"axis": 1})
    assert "TopK of 4000, it has to be below 3840" in refusal(topk, constants=[("k", [4000])])
    wide = ("ScatterElements", ["x", "at", "at_x"], ["y"], {"axis": 1})
    at = [("at", np.zeros((4, 9), np.int64)), ("at_x", np.zeros((4, 9), np.float32))]
    assert "ScatterElements of 9 indices into 8 places" in refusal(wide, constants=at)
    zero = [("scale", np.float32(1)), ("zero", np.uint8(3))]
    quantized = ("QuantizeLinear", ["x", "scale", "zero"], ["q"], {})
    assert "zero point other than 0" in refusal(quantized, ("Cast", ["q"], ["y"], {"to": 1}), constants=zero)


@pytest.mark.nightly
def test_a_graph_of_labels_is_no_model_for_windows(shapes_run, photographs, tmp_path, call, refused):
    call(export_onnx, shapes_run, "--output", "labels", "--out", tmp_path / "a.onnx", "--batch-size", 2, *FEW)
    error = refused(inference, tmp_path / "a.onnx", "-i", photographs, "-o", tmp_path / "b", *CPU)
    assert "--output scores" in error


@pytest.mark.nightly
def test_a_fixed_number_of_images_is_filled_up(shapes_run, tmp_path, call):
    out = call(export_onnx, shapes_run, "--batch-size", 3, "--int8", "--out", tmp_path / "a.onnx", "--max-images", 4)
    assert "int8, static" in out and "mIoU" in out and "images 3 × 3 × 32 × 32" in out
    model = ExportedModel(tmp_path / "a.onnx")
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
    torch.testing.assert_close(ExportedModel(tmp_path / "a.onnx")(images), expected, atol=1e-4, rtol=1e-4)


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
    assert "leave --amp out" in refused(inference, tmp_path / "other.onnx", "--amp", *read)
    assert "export it first" in refused(test, shapes_run, "--runtime", "openvino", *CPU)
    (tmp_path / "a.pt2").write_bytes(b"no package")
    assert "cannot open" in refused(inference, tmp_path / "a.pt2", *read)
    assert "does not run in openvino" in refused(inference, tmp_path / "a.pt2", "--runtime", "openvino", *read)
    monkeypatch.setattr(exported, "find_spec", lambda name: None)
    assert "pip install 'g2tm[onnx]'" in refused(export_onnx, shapes_run, *FEW)
    assert "pip install 'g2tm[openvino]'" in refused(export_onnx, shapes_run, "--runtime", "openvino", *FEW)


@pytest.mark.nightly
def test_images_of_another_size_are_refused(shapes_run, tmp_path, call):
    call(export_onnx, shapes_run, "--out", tmp_path / "a.onnx", *FEW)
    model = ExportedModel(tmp_path / "a.onnx")
    assert model(torch.zeros(3, 3, 32, 32)).shape == (3, 11, 32, 32)
    with pytest.raises(ValueError, match="33 × 32 pixels, the exported model takes 32 × 32"):
        model(torch.zeros(1, 3, 33, 32))
