"""The recipes: options that exist, backbones that exist, curricula that end before training does."""

from pathlib import Path

import pytest
import yaml

from segm import train

CONFIGS = Path(__file__).parents[2] / "configs"
RECIPES = sorted((CONFIGS / "recipes").glob("*.yml"))
ALWAYS = {"dataset", "backbone", "decoder", "patch_type"}
ALLOWED = ALWAYS | {
    *("im_size", "crop_size", "window_size", "window_stride", "batch_size", "epochs", "learning_rate"),
    *(
        "selected_layers",
        "merging_window_size",
        "scheduler",
        "selected_layer",
        "threshold",
        "start_thresh",
        "curric_warmup",
        "curric_period",
    ),
}
CURRICULUM = {"start_thresh", "curric_warmup", "curric_period"}
STEP = 0.01


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_one_recipe_per_published_row():
    rows = {("ade20k", 512): "tiny small base large", ("cityscapes", 768): "tiny small base large"}
    rows[("cityscapes", 1024)] = "tiny small base"
    wanted = {
        f"{dataset}_{size}_{model}_{kind}"
        for (dataset, size), models in rows.items()
        for model in models.split()
        for kind in ("pure", "graph")
    }
    algm = "ade20k_512_tiny ade20k_512_small ade20k_512_base ade20k_640_large cityscapes_768_small cityscapes_768_large"
    algm += " coco_512_small coco_512_base pascal_480_small pascal_480_large"
    wanted |= {f"{row}_{kind}" for row in algm.split() for kind in ("pure", "algm")}
    assert wanted == {path.stem for path in RECIPES}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_train_accepts_the_recipe(path):
    """Up to the settings: keys, types, method, layers and threshold fit the backbone."""
    context = train.main.make_context("train", ["--config", str(path), "--log-dir", "unused", "--no-pretrained"])
    given = dict(context.params)
    if given["threshold"] == "auto":
        given["threshold"] = 0.9
    variant, (method, _), curriculum = train._plan(given, {}, False)
    assert method == load(path)["patch_type"] and (curriculum is not None) == bool(CURRICULUM & load(path).keys())
    assert variant["net_kwargs"]["backbone"] == load(path)["backbone"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe(path):
    recipe = load(path)
    assert ALWAYS <= recipe.keys() <= ALLOWED
    assert recipe["backbone"] in load(CONFIGS / "backbones.yml")
    assert recipe["decoder"] in load(CONFIGS / "decoders.yml")
    defaults = load(CONFIGS / "datasets.yml")[recipe["dataset"]]
    repeated = {key for key in recipe.keys() & defaults.keys() if recipe[key] == defaults[key]}
    assert not repeated, f"{repeated} are the data set's defaults already"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_name_says_what_the_recipe_does(path):
    recipe = load(path)
    dataset, size, model, kind = path.stem.split("_")
    crop = load(CONFIGS / "datasets.yml")[recipe["dataset"]] | recipe
    assert recipe["dataset"].startswith(dataset)
    assert (crop["crop_size"], recipe["patch_type"]) == (int(size), kind)
    assert f"vit_{model}_" in recipe["backbone"]
    assert recipe["scheduler"] == {"pure": "polynomial", "graph": "polynomial_epoch", "algm": "polynomial"}[kind]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_first_line_has_the_published_figures(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("# ")
    assert all(unit in lines[0] for unit in ("mIoU", "im/s", "GFLOPs"))
    assert not any(line.startswith("#") for line in lines[1:])


@pytest.mark.parametrize("path", [path for path in RECIPES if CURRICULUM & load(path).keys()], ids=lambda p: p.stem)
def test_curriculum_reaches_its_threshold(path):
    recipe = load(path)
    assert CURRICULUM | {"threshold", "epochs"} <= recipe.keys()
    steps = round((recipe["start_thresh"] - recipe["threshold"]) / STEP)
    assert steps > 0
    assert recipe["epochs"] >= recipe["curric_warmup"] + steps * recipe["curric_period"]
