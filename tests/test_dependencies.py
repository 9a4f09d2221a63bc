"""The packages of OneDL are a young continuation of OpenMMLab's: what we use of them is held here, name by name."""

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("g2tm", "patch", "segm", "vis", "scripts")
PACKAGES = ("mmseg", "mmcv", "mmengine")

READER, PUBLIC, HEADS, VIT = (
    "segm/data/openmmlab.py",
    "segm/data/public.py",
    "segm/model/openmmlab_heads.py",
    "patch/families/mmseg_vit.py",
)

# Name -> the file that uses it. Another name needs a row in CONTRIBUTING.md, which says what would replace it.
USED = {
    "mmseg.datasets": READER,
    "mmseg.datasets.BaseSegDataset": READER,
    "mmseg.datasets.transforms.PhotoMetricDistortion": READER,
    "mmseg.datasets.transforms.RandomCrop": READER,
    "mmseg.datasets.transforms.transforms.RandomFlip": READER,
    "mmseg.datasets.transforms.transforms.Resize": READER,
    "mmcv.transforms.Normalize": READER,
    "mmcv.transforms.Pad": READER,
    "mmcv.transforms.RandomResize": READER,
    "mmseg.datasets.ADE20KDataset": PUBLIC,
    "mmseg.datasets.COCOStuffDataset": PUBLIC,
    "mmseg.datasets.CityscapesDataset": PUBLIC,
    "mmseg.datasets.PascalContextDataset": PUBLIC,
    "mmseg.models.decode_heads.FCNHead": HEADS,
    "mmseg.models.decode_heads.SETRMLAHead": HEADS,
    "mmseg.models.decode_heads.SETRUPHead": HEADS,
    "mmseg.models.decode_heads.UPerHead": HEADS,
    "mmseg.models.necks.Feature2Pyramid": HEADS,
    "mmseg.models.necks.MLANeck": HEADS,
    "mmengine.registry.MODELS: BN": HEADS,
    "mmengine.registry.MODELS: ReLU": HEADS,
    "mmseg.models.backbones.vit": VIT,
    "mmseg.models.backbones.vit.TransformerEncoderLayer": VIT,
    "mmseg.models.backbones.vit.VisionTransformer": VIT,
}


def text(node: ast.AST | None) -> str:
    """The string that a node is; "" for any other."""
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def imported(tree: ast.AST) -> set[str]:
    """Modules and names that are imported from the packages, anywhere in a file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in PACKAGES}


def written(tree: ast.AST) -> set[str]:
    """Names that stand in strings: modules with a dot, kinds in configurations of OpenMMLab, classes of data sets."""
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
    found = set()
    for node in ast.walk(tree):
        if re.fullmatch(rf"({'|'.join(PACKAGES)})(\.\w+)+", text(node)):
            found.add(text(node))
        pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ()
        found |= {f"mmengine.registry.MODELS: {text(value)}" for key, value in pairs if text(key) == "type"}
        called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
        keywords = {one.arg: one.value for one in node.keywords} if called else {}
        if called == "dict":
            found.add(f"mmengine.registry.MODELS: {text(keywords.get('type'))}")
        if called == "Layout":
            name = text(node.args[0] if node.args else keywords.get("mmseg_class"))
            found |= {f"mmseg.datasets.{name}"} - {f"mmseg.datasets.{one}" for one in own}
    return {name for name in found if not name.endswith((": ", "."))}


def names_in(code: str) -> set[str]:
    """All names of the packages in a source. The ViT of mmsegmentation is recognized by module and class."""
    tree = ast.parse(code)
    found = imported(tree) | written(tree)
    for module in [name for name in found if name == "mmseg.models.backbones.vit"]:
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and module in map(text, ast.walk(node.value)):
                found |= {f"{module}.{text(one)}" for one in ast.walk(node.value) if text(one).isidentifier()}
    return found


def used() -> dict[str, list[str]]:
    """Every name -> the files that use it, in order."""
    found: dict[str, list[str]] = {}
    for file in sorted(file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")):
        for name in names_in(file.read_text()):
            found.setdefault(name, []).append(file.relative_to(ROOT).as_posix())
    return found


def test_these_names_of_onedl_are_used_and_no_others():
    assert used() == {name: [file] for name, file in USED.items()}


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("def late():\n    from mmcv.cnn import ConvModule as C, Scale", {"mmcv.cnn.ConvModule", "mmcv.cnn.Scale"}),
        ("import mmengine, mmsegment", {"mmengine"}),
        ("act = {'type': 'GELU'}", {"mmengine.registry.MODELS: GELU"}),
        ("act = dict(type='GELU')", {"mmengine.registry.MODELS: GELU"}),
        ("one = Layout('LoveDADataset', ())", {"mmseg.datasets.LoveDADataset"}),
        ("class Mine: ...\none = Layout(mmseg_class='Mine')", set()),
        ("kind = importlib.import_module('mmseg.evaluation')", {"mmseg.evaluation"}),
        ("option(type='x', kind={'type': int})\n'as mmseg.models does'", set()),
    ],
)
def test_every_way_to_use_a_name_is_seen(code, names):
    assert names_in(code) == names


def test_contributing_says_what_replaces_each_of_them():
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## If OneDL's packages stop")[1].split("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("|")]
    said = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    classes = {re.split(r"\.|: ", name)[-1] for name in USED} - {"datasets", "vit"}
    assert said == classes, sorted(said ^ classes)


@pytest.mark.slow
def test_the_installed_packages_have_these_names():
    import segm.model.openmmlab_heads  # noqa: F401 - first: it keeps the import of mmseg quiet

    for name in USED:
        where, _, kind = name.partition(": ")
        module, _, attribute = where.rpartition(".")
        if kind:
            assert getattr(importlib.import_module(module), attribute).get(kind) is not None, name
        elif not hasattr(importlib.import_module(module), attribute):
            importlib.import_module(where)
