"""The settings of a training: where each comes from, and where it is written."""

from types import SimpleNamespace

import pytest
import torch

from segm import train
from segm.data import DATASETS
from segm.data.factory import dataset_defaults
from segm.merging import parse
from segm.plan import SETTINGS, Plan, Settings, backbone_settings, finetuning_defaults, names_of, read_settings
from segm.variant import read_variant, write_variant

BASE = {"dataset": "shapes", "backbone": "vit_tiny_patch16_384"}
IMAGES = SimpleNamespace(n_cls=2, name="shapes", classes=("a", "b"), palette=torch.zeros(2, 3, dtype=torch.uint8))
EVERY = {
    "dropout": 0.25, "decoder_dropout": 0.35, "drop_path": 0.15, "optimizer": "adamw", "scheduler": "cosine",
    "learning_rate": 0.002, "minlearning_rate": 0.0001, "weight_decay": 0.03, "warmup_epochs": 1,
    "start_factor": 0.5, "batch_size": 4, "epochs": 30, "eval_freq": 2, "num_workers": 0, "seed": 3,
    "im_size": 40, "crop_size": 32, "window_size": 32, "window_stride": 16, "normalization": "deit",
    "patch_size": 8, "d_model": 64, "n_heads": 4, "n_layers": 2, "decoder": "mask_transformer",
    "encoder_lr_mult": 0.1, "layer_decay": 0.75, "cache_features": 0, "scale_range": (0.75, 1.5),
    "start_thresh": 0.95, "curric_warmup": 2, "curric_period": 3, **BASE,
}  # fmt: skip
GRAPH = parse(["--patch-type", "graph", "--threshold", "0.9"])


def make(given=None, merging=None, saved=None, resume=False):
    return Plan.make(BASE | (given or {}), merging or {}, saved or {}, resume)


def test_every_setting_goes_from_its_flag_to_the_variant_file_and_back():
    words = {name: map(str, value) if isinstance(value, tuple) else [str(value)] for name, value in EVERY.items()}
    flags = [text for name, values in words.items() for text in ("--" + name.replace("_", "-"), *values)]
    given = train.main.make_context("train", ["--log-dir", "unused", "--amp", "--freeze-encoder", *flags]).params
    given = {name: given[name] for name in SETTINGS if name in given}
    assert given.pop("train_only") is None and given.pop("decoder_blocks") is None
    variant = make(given, GRAPH).variant(IMAGES)
    assert read_settings(variant) == given == EVERY | {"amp": True, "freeze_encoder": True}
    assert set(given) | {"distilled", "train_only", "decoder_blocks"} == set(SETTINGS)
    again = Plan.make({}, {}, variant, resume=True)
    assert again.variant(IMAGES) == variant and again.curriculum == make(given, GRAPH).curriculum


def test_training_learned_parts_alone_turns_them_on():
    def learning(text):
        return make({"train_only": "method"}, parse(["--patch-type", *text.split()]))

    assert learning("ltmp").options["learned"] and learning("fpet").options["adapter"]
    assert learning("dtem").reduction == {"name": "dtem"}
    variant = learning("diffrate --granularity 2").variant(IMAGES)
    assert variant["net_kwargs"]["reduction"] == {"name": "diffrate", "granularity": 2}
    assert variant["dataset_kwargs"]["learned"] and variant["net_kwargs"]["drop_path_rate"] == 0
    for text, allowed in (("tome", "tome has nothing to learn"), ("ltmp --merge-threshold 0.5", "--not-learned")):
        with pytest.raises(ValueError, match=allowed):
            learning(text)
    with pytest.raises(ValueError, match="pure has nothing to learn"):
        make({"train_only": "method"})


def test_the_variant_has_the_published_layout():
    variant = make(EVERY, GRAPH).variant(IMAGES)
    net, data = variant["net_kwargs"], variant["dataset_kwargs"]
    assert net["image_size"] == [32, 32] and net["n_cls"] == net["decoder"]["n_cls"] == 2 and not net["distilled"]
    assert net["decoder"] | {"name": "mask_transformer", "dropout": 0.35} == net["decoder"]
    assert data["split"] == "train" and data["batch_size"] == variant["algorithm_kwargs"]["batch_size"] == 4
    assert (data["start_threshold"], data["curriculum_start"], data["curriculum_period"]) == (0.95, 2, 3)
    assert variant["inference_kwargs"] == {"im_size": 40, "window_size": 32, "window_stride": 16}
    schedule = variant["optimizer_kwargs"]
    assert (schedule["momentum"], schedule["poly_power"], schedule["epochs"]) == (0.9, 0.9, 30)
    assert variant["world_batch_size"] == 4 and variant["version"] == "normal"
    pure = make({"decoder": "linear"}).variant(IMAGES)
    assert pure["net_kwargs"]["decoder"] == {"name": "linear", "n_cls": 2} and "reduction" not in pure["net_kwargs"]


def test_defaults_are_those_of_data_set_and_backbone():
    for dataset in DATASETS:
        settings = Settings.complete({"dataset": dataset, "backbone": "vit_large_patch16_384"}, {})
        for name in names_of("the data set's"):
            assert getattr(settings, name) == dataset_defaults(dataset)[name]
        assert (settings.d_model, settings.n_layers, settings.optimizer) == (1024, 24, "sgd")
    settings = Settings.complete({"dataset": "shapes", "backbone": "deit_tiny_patch16_224"}, {})
    for name in names_of("the backbone's"):
        assert getattr(settings, name) == backbone_settings("deit_tiny_patch16_224")[name]


def test_what_was_given_beats_what_was_saved_and_this_the_defaults():
    saved = {"dataset": "cityscapes", "backbone": "vit_base_patch16_384", "crop_size": 640, "window_stride": 100}
    saved |= {"window_size": 640, "d_model": 768, "n_heads": 6, "learning_rate": 0.5, "seed": 7}
    for given, expected in (
        ({}, saved),
        ({"seed": 1}, {"seed": 1, "crop_size": 640, "n_heads": 6}),
        ({"dataset": "ade20k"}, {"crop_size": 512, "learning_rate": 0.001, "window_stride": 512, "n_heads": 6}),
        ({"backbone": "vit_tiny_patch16_384"}, {"d_model": 192, "n_heads": 3, "crop_size": 640, "seed": 7}),
        ({"d_model": 128}, {"d_model": 128, "n_heads": 2}),  # heads of 64 channels
        ({"d_model": 128, "n_heads": 8}, {"n_heads": 8}),
        ({"crop_size": 320}, {"window_size": 320, "window_stride": 320}),
        ({"crop_size": 320, "window_size": 400, "window_stride": 200}, {"window_size": 400, "window_stride": 200}),
        ({"window_size": 64}, {"window_size": 64, "window_stride": 64, "crop_size": 640}),
        ({"crop_size": (320, 640)}, {"window_size": (320, 640), "window_stride": (320, 512)}),
        ({"window_size": (64, 640)}, {"window_stride": (64, 100), "crop_size": 640}),
    ):
        settings = Settings.complete(given, saved)
        assert {name: getattr(settings, name) for name in expected} == expected, given


def test_a_crop_may_be_higher_or_wider(tmp_path):
    plan = make({"crop_size": (32, 64), "window_size": (32, 64), "window_stride": (16, 64)})
    assert plan.settings.grid == (32 // plan.settings.patch_size, 64 // plan.settings.patch_size)
    variant = plan.variant(IMAGES)
    assert variant["net_kwargs"]["image_size"] == [32, 64] == variant["dataset_kwargs"]["crop_size"]
    write_variant(variant, tmp_path)
    found = read_settings(read_variant(tmp_path))
    assert (found["crop_size"], found["window_stride"]) == ((32, 64), (16, 64))
    Plan.make({"crop_size": (32, 64)}, {}, variant, resume=True)


def test_a_resumed_run_keeps_what_its_weights_belong_to():
    saved = make(EVERY | {"start_thresh": None, "curric_warmup": None, "curric_period": None}).variant(IMAGES)
    for name, value in (("n_layers", 3), ("optimizer", "sgd"), ("batch_size", 2), ("crop_size", 64)):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: .*--finetune"):
            Plan.make({name: value}, {}, saved, resume=True)
        Plan.make({name: value}, {}, saved)
    assert Plan.make({"epochs": 99, "n_layers": 2}, {}, saved, resume=True).settings.epochs == 99


def test_merging_is_completed_and_checked_for_the_network():
    plan = make({"n_layers": 24}, parse(["--patch-type", "algm"]))
    assert (plan.method, plan.options["layers"], plan.options["window"]) == ("algm", (1, 7), (2, 2))
    for words, hint in (("algm --selected-layers 1 99", "1 to 12"), ("algm --merging-window-size 9 99", "window")):
        with pytest.raises(ValueError, match=hint):
            make({}, parse(["--patch-type", *words.split()]))


def test_a_curriculum_belongs_to_its_method():
    times = {"start_thresh": 0.95, "curric_warmup": 2, "curric_period": 3, "epochs": 17}
    saved = make(times, GRAPH).variant(IMAGES)
    assert Plan.make({}, {}, saved, resume=True).curriculum.epochs == 17
    assert Plan.make({}, {"threshold": 0.94}, saved).curriculum.target == 0.94
    assert Plan.make({}, {"patch_type": "algm"}, saved).curriculum is None
    assert Plan.make({}, {"patch_type": "pure"}, saved).curriculum is None
    start = finetuning_defaults(saved)
    assert Plan.make({}, {}, start).curriculum is None and Plan.make({}, {}, start).options["threshold"] == 0.9
    for given, merging, hint in (
        (times | {"epochs": 16}, GRAPH, "more --epochs"),
        (times | {"curric_period": None}, GRAPH, "--curric-period"),
        (times, {}, "--threshold"),
        (times, {"patch_type": "tome"}, "--threshold"),
        (times | {"start_thresh": 0.5}, GRAPH, "below"),
    ):
        with pytest.raises(ValueError, match=hint):
            make(given, merging)


def test_fine_tuning_takes_over_network_data_and_merging_but_no_schedule():
    start = finetuning_defaults(make(EVERY, GRAPH).variant(IMAGES))
    settings = Plan.make({"learning_rate": 0.1, "epochs": 3}, {}, start).settings
    kept = {"d_model": 64, "crop_size": 32, "window_stride": 16, "decoder_dropout": 0.35}
    assert {name: getattr(settings, name) for name in kept} == kept
    assert (settings.optimizer, settings.weight_decay, settings.warmup_epochs) == ("sgd", 0.0, 0)


def test_learned_parts_stay_in_a_model_that_has_some():
    saved = make({}, {"patch_type": "dtem"}).variant(IMAGES)
    assert saved["net_kwargs"]["reduction"]["name"] == "dtem"
    for merging in ({}, {"patch_type": "pure"}, {"patch_type": "graph"}):
        assert Plan.make({}, merging, saved).reduction == saved["net_kwargs"]["reduction"]
    saved["net_kwargs"]["reduction"] = {"name": "other"}
    with pytest.raises(ValueError, match="other"):
        Plan.make({}, {}, saved)


def test_missing_and_unknown_names_are_refused():
    for given, hint in (
        ({"dataset": "shapes"}, "--backbone"),
        ({"backbone": "vit_tiny_patch16_384"}, "--dataset"),
        (BASE | {"dataset": "nosuch"}, "nosuch"),
        (BASE | {"backbone": "vit_nosuch"}, "vit_tiny_patch16_384"),
        (BASE | {"backbone": "resnet18"}, "not a plain ViT"),
        (BASE | {"decoder": "nosuch"}, "mask_transformer"),
    ):
        with pytest.raises(ValueError, match=hint):
            Plan.make(given, {}, {})
