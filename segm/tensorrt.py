"""The check of an ONNX file for TensorRT, as far as the graph tells without a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

RELEASE = "TensorRT 10.15"
OPSETS = 9, 24
LARGEST_K = 3840  # of TopK, exclusive
# Standard operators that its parser lacks, by the list of onnx-tensorrt (docs/operators.md).
LACKING = {
    *("AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad"),
    *("Col2Im", "Compress", "ConcatFromSequence", "ConvInteger", "DFT", "Det", "DynamicQuantizeLinear", "ImageDecoder"),
    *("MatMulInteger", "MaxRoiPool", "MaxUnpool", "MelWeightMatrix", "Multinomial", "NegativeLogLikelihoodLoss"),
    *("Optional", "OptionalGetElement", "OptionalHasElement", "QLinearConv", "QLinearMatMul", "RegexFullMatch"),
    *("SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceLength"),
    *("SequenceMap", "SoftmaxCrossEntropyLoss", "SplitToSequence", "StringConcat", "StringNormalizer", "StringSplit"),
    *("TfIdfVectorizer", "Unique"),
}
Shapes = dict[str, tuple[int | None, ...]]  # of tensors by name; None where a size varies
BRANCHES = {"If", "Loop", "Scan"}  # it takes them, and then waits for the data that they depend on


def check(file: Path) -> str:
    """Check a graph against TensorRT's list of operators and its restrictions on them, and for fixed shapes.

    Args:
        file: ONNX.

    Returns:
        What was checked, in words.

    Raises:
        ValueError: what TensorRT would refuse or be slow with.
    """
    import onnx

    model = onnx.load(file)
    found = [*dict.fromkeys(_obstacles(onnx.shape_inference.infer_shapes(model)))]
    if found:
        raise ValueError(f"{file} is no graph for {RELEASE}: {'; '.join(found)}")
    kinds = {node.op_type for node in model.graph.node}
    return f"{RELEASE}: fixed shapes, no If, Loop or Scan, {len(kinds)} kinds of operators, all in its list"


def _obstacles(model: Any) -> Iterator[str]:
    import onnx

    graph = model.graph
    opset = max(one.version for one in model.opset_import if one.domain == "")
    if not OPSETS[0] <= opset <= OPSETS[1]:
        yield f"opset {opset} is not within {OPSETS[0]} to {OPSETS[1]} (--opset)"
    known = {one.name for one in onnx.defs.get_all_schemas() if one.domain == ""}
    constants = {one.name: one for one in graph.initializer}
    shapes: Shapes = {one.name: tuple(one.dims) for one in graph.initializer}
    for one in (*graph.input, *graph.value_info, *graph.output):
        dims = one.type.tensor_type.shape.dim
        shapes[one.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    for node in graph.node:
        if node.op_type in BRANCHES:
            yield f"{node.op_type} depends on data (choose a budget, --tokens)"
        elif node.domain not in ("", "ai.onnx") or node.op_type in LACKING or node.op_type not in known:
            yield f"operator {node.op_type} is not in its list"
        yield from _restrictions(node, constants, shapes)
    for name in (*shapes, *(output for node in graph.node for output in node.output if output)):
        if None in shapes.get(name, (None,)):
            yield f"shapes vary, first that of {name} (--batch-size N, and a budget, --tokens)"
            return


def _restrictions(node: Any, constants: dict[str, Any], shapes: Shapes) -> Iterator[str]:
    """Breaches of what its list says of single operators that a merge consists of."""
    import onnx

    attributes = {one.name: onnx.helper.get_attribute_value(one) for one in node.attribute}
    given = [constants.get(name) for name in node.input]
    if node.op_type == "TopK":
        k = None if given[1] is None else int(onnx.numpy_helper.to_array(given[1]).item())
        if k is None or k >= LARGEST_K:
            yield f"TopK of {'a number not known beforehand' if k is None else k}, it has to be below {LARGEST_K}"
        if not attributes.get("sorted", 1):
            yield "TopK that does not sort"
    elif node.op_type == "ScatterND" and attributes.get("reduction", b"none") != b"none":
        yield f"ScatterND with reduction {attributes['reduction'].decode()}"
    elif node.op_type == "ScatterElements":
        axis = attributes.get("axis", 0)
        places, indices = (_size(shapes, name, axis) for name in node.input[:2])
        if places is not None and indices is not None and indices > places:
            yield f"ScatterElements of {indices} indices into {places} places"
    elif node.op_type.startswith("Reduce") and len(given) > 1 and given[1] is None:
        yield f"{node.op_type} over axes not known beforehand"
    elif node.op_type in ("QuantizeLinear", "DequantizeLinear") and _is_set(given[2:]):
        yield f"{node.op_type} with a zero point other than 0"


def _is_set(zero_point: list[Any]) -> bool:
    """Return whether there is a zero point other than 0."""
    import onnx

    return any(one is None or onnx.numpy_helper.to_array(one).any() for one in zero_point)


def _size(shapes: Shapes, name: str, axis: int) -> int | None:
    shape = shapes.get(name)
    return shape[axis] if shape else None
