"""The recipes: options that exist, backbones that exist, curricula that end before training does."""

from pathlib import Path

import yaml

from segm import train
from segm.config import SETTINGS
from segm.resolve import curriculum, resolve

CONFIGS = Path(__file__).parents[2] / "configs"
EVERY = sorted((CONFIGS / "recipes").glob("*.yml"))
# Ours, of other heads, fine-tuned, without a published figure.
OTHERS = ("dinov2", "setr", "segvit", "eomt", "finetuned", "coco_512_large")
RECIPES = [path for path in EVERY if not any(word in path.stem for word in OTHERS)]  # of published rows
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
        "clusters",
        "cluster_width",
        "decoder_dropout",
        "minlearning_rate",
        "r",
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
    wanted |= {
        f"ade20k_{size}_{kind}"
        for size in ("512_tiny", "512_small", "512_base", "640_large")
        for kind in ("clustvit", "tome")
    }
    wanted |= {f"{dataset}_512_base_{kind}" for dataset in ("suim", "rumexweeds") for kind in ("pure", "clustvit")}
    assert wanted == {path.stem for path in RECIPES}


def test_train_accepts_every_recipe():
    """Up to the settings: keys, types, method, layers, threshold and curriculum fit the backbone."""
    for path in EVERY:
        recipe = load(path)
        params = train.main.make_context("train", ["--config", str(path), "--log-dir", "unused"]).params
        merging = params["merging"]
        if merging.get("threshold") == "auto":
            merging["threshold"] = 0.9
        config = resolve({name: params[name] for name in SETTINGS if name in params} | merging)
        chosen = (config.merging.method, config.net.backbone)
        assert chosen == (recipe.get("patch_type", "pure"), recipe["backbone"]), path.stem
        assert (curriculum(config) is not None) == bool(CURRICULUM & recipe.keys()), path.stem


def test_other_heads_have_recipes_with_and_without_algm():
    """GBM merges in the published layer of each: SETR-B 5, SETR-L 13, SegViT-L 12."""
    layers = {"ade20k_640_large_segvit": 12}
    for data in ("ade20k_512", "pascal_480"):
        layers |= {f"{data}_base_setr_pup": 5, f"{data}_large_setr_pup": 13}
    for name, layer in layers.items():
        plain, merged = (load(CONFIGS / f"recipes/{stem}.yml") for stem in (name, f"{name}_algm"))
        assert (plain.pop("patch_type"), merged.pop("patch_type")) == ("pure", "algm")
        assert merged.pop("selected_layers") == [1, layer] and merged.pop("merging_window_size") == [2, 2]
        assert merged.pop("threshold") and merged == plain


def test_recipes_say_only_what_differs_from_the_defaults():
    for path in RECIPES:
        recipe = load(path)
        assert ALWAYS <= recipe.keys() <= ALLOWED, path.stem
        assert recipe["backbone"] in load(CONFIGS / "backbones.yml")
        assert recipe["decoder"] in load(CONFIGS / "decoders.yml")
        defaults = load(CONFIGS / "datasets.yml")[recipe["dataset"]]
        repeated = {key for key in recipe.keys() & defaults.keys() if recipe[key] == defaults[key]}
        assert not repeated, f"{path.stem}: {repeated} are the data set's defaults already"


def test_names_say_what_the_recipes_do():
    schedules = dict.fromkeys(("pure", "algm", "tome", "clustvit"), "polynomial") | {"graph": "polynomial_epoch"}
    for path in RECIPES:
        recipe = load(path)
        dataset, size, model, kind = path.stem.split("_")
        crop = load(CONFIGS / "datasets.yml")[recipe["dataset"]] | recipe
        assert recipe["dataset"].startswith(dataset) and f"vit_{model}_" in recipe["backbone"], path.stem
        assert (crop["crop_size"], recipe["patch_type"]) == (int(size), kind), path.stem
        assert recipe["scheduler"] == schedules[kind], path.stem


def test_first_lines_have_the_published_figures():
    for path in RECIPES:
        first, *others = path.read_text(encoding="utf-8").splitlines()
        assert first.startswith("# ") and all(unit in first for unit in ("mIoU", "im/s", "GFLOPs")), path.stem
        assert not any(line.startswith("#") for line in others), path.stem


def test_curricula_reach_their_thresholds():
    curricula = [recipe for recipe in map(load, RECIPES) if CURRICULUM & recipe.keys()]
    assert curricula
    for recipe in curricula:
        assert CURRICULUM | {"threshold", "epochs"} <= recipe.keys()
        steps = round((recipe["start_thresh"] - recipe["threshold"]) / STEP)
        assert steps > 0 and recipe["epochs"] >= recipe["curric_warmup"] + steps * recipe["curric_period"]
