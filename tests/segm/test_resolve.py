"""The settings of a training: where each comes from, and where it is written."""

import click
import numpy as np
import pytest
import timm

from segm import merging, train
from segm.config import BACKBONE, DATA, DATASETS, DECODERS, SETTINGS, RunConfig
from segm.data.factory import dataset_defaults
from segm.data.images import Normalization, get_normalization, name_of_normalization
from segm.merging import parse
from segm.model.decoder import create_decoder
from segm.resolve import backbone_settings, curriculum, resolve
from tests.helpers import read_variant

BASE = {"dataset": "shapes", "backbone": "vit_tiny_patch16_384"}
CLASSES = [{"id": index, "name": name, "color": [0, 0, 0]} for index, name in enumerate("ab")]
NO_FLAG = {"distilled", "decoder_layers", "decoder_drop_path", "n_cls", "image_size", "reduction", "classes"}
NO_FLAG |= {"inventory", "eval_size", "method", "epochs_before"}
ABSENT = {"train_only", "decoder_blocks", "bands", "updates", "eval_every"}  # from the command of the first test
EVERY = {
    "dropout": 0.25, "decoder_dropout": 0.35, "drop_path": 0.15, "optimizer": "adamw", "scheduler": "cosine",
    "learning_rate": 0.002, "minlearning_rate": 0.0001, "weight_decay": 0.03, "warmup_epochs": 1,
    "start_factor": 0.5, "batch_size": 4, "epochs": 30, "eval_freq": 2, "num_workers": 0, "seed": 3,
    "im_size": 40, "crop_size": 32, "window_size": 32, "window_stride": 16, "normalization": "deit",
    "mean": (0.1, 0.2, 0.3), "std": (1.0, 2.0, 0.5), "value_range": (-5.0, 4095.0),
    "patch_size": 8, "d_model": 64, "n_heads": 4, "n_layers": 2, "decoder": "mask_transformer",
    "encoder_lr_mult": 0.1, "layer_decay": 0.75, "cache_features": 0, "clip_grad": 1.5, "scale_range": (0.75, 1.5),
    "accumulate": 2, "ema": 0.999, "patience": 5, "loss": "cross_entropy,dice", "class_weights": "auto",
    "start_thresh": 0.95, "curric_warmup": 2, "curric_period": 3, **BASE,
}  # fmt: skip
GRAPH = parse(["--patch-type", "graph", "--threshold", "0.9"])


def make(given=None, merging=None, base=None, resume=False):
    return resolve(BASE | (given or {}) | (merging or {}), base, resume=resume)


def trained(config):
    """The configuration of a finished run."""
    return config.with_values(n_cls=2, classes=CLASSES)


def options_of(config):
    return merging.read_variant(config.merging.entries)[1]


def test_every_setting_goes_from_its_flag_to_the_variant_file_and_back(tmp_path):
    words = {name: map(str, value) if isinstance(value, tuple) else [str(value)] for name, value in EVERY.items()}
    flags = [text for name, values in words.items() for text in ("--" + name.replace("_", "-"), *values)]
    given = train.main.make_context(
        "train", ["--log-dir", "unused", "--amp", "--freeze-encoder", "--no-flip", *flags]
    ).params
    given = {name: given[name] for name in SETTINGS if name in given}
    assert all(given.pop(name) is None for name in ABSENT)
    assert given == EVERY | {"amp": True, "freeze_encoder": True, "flip": False}
    assert set(given) | NO_FLAG | ABSENT == set(SETTINGS)
    config = trained(make(given, GRAPH))
    config.write(tmp_path)
    again = RunConfig.read(tmp_path)
    assert {name: again.values[name] for name in given} == given
    assert again == config == trained(resolve({}, again, resume=True))
    assert RunConfig.from_variant(read_variant(tmp_path)) == config and curriculum(config).start == 0.95


def test_training_learned_parts_alone_turns_them_on():
    def learning(text):
        return make({"train_only": "method"}, parse(["--patch-type", *text.split()]))

    assert options_of(learning("ltmp"))["learned"] and options_of(learning("fpet"))["adapter"]
    assert learning("dtem").net.reduction == {"name": "dtem"}
    variant = learning("diffrate --granularity 2").to_variant()
    assert variant["net_kwargs"]["reduction"] == {"name": "diffrate", "granularity": 2}
    assert variant["dataset_kwargs"]["learned"] and variant["net_kwargs"]["drop_path_rate"] == 0
    for text, allowed in (("tome", "tome has nothing to learn"), ("ltmp --merge-threshold 0.5", "--not-learned")):
        with pytest.raises(ValueError, match=allowed):
            learning(text)
    with pytest.raises(ValueError, match="pure has nothing to learn"):
        make({"train_only": "method"})


def test_the_variant_has_the_published_layout():
    variant = trained(make(EVERY, GRAPH)).to_variant()
    net, data = variant["net_kwargs"], variant["dataset_kwargs"]
    assert net["image_size"] == [32, 32] and net["n_cls"] == net["decoder"]["n_cls"] == 2 and not net["distilled"]
    assert net["decoder"] | {"name": "mask_transformer", "dropout": 0.35} == net["decoder"]
    assert data["split"] == "train" and data["batch_size"] == variant["algorithm_kwargs"]["batch_size"] == 4
    assert (data["start_threshold"], data["curriculum_start"], data["curriculum_period"]) == (0.95, 2, 3)
    assert variant["inference_kwargs"] == {"im_size": 40, "window_size": 32, "window_stride": 16}
    schedule = variant["optimizer_kwargs"]
    assert (schedule["momentum"], schedule["poly_power"], schedule["epochs"]) == (0.9, 0.9, 30)
    assert variant["world_batch_size"] == 4 and variant["version"] == "normal"
    pure = trained(make({"decoder": "linear"})).to_variant()
    assert pure["net_kwargs"]["decoder"] == {"name": "linear", "n_cls": 2} and "reduction" not in pure["net_kwargs"]


def test_decoders_are_those_of_the_model():
    for name in DECODERS:
        if name not in ("setr_naive", "setr_pup", "setr_mla", "upernet"):  # mmsegmentation's
            create_decoder(32, 5, {"name": name}, 4, 8)
    with pytest.raises(ValueError, match=", ".join(DECODERS)):
        create_decoder(32, 5, {"name": "nosuch"}, 4, 8)


def test_defaults_are_those_of_data_set_and_backbone():
    def names_of(owner):
        return [name for name, (_, entry) in SETTINGS.items() if entry.metadata.get("default_from") == owner]

    for dataset in DATASETS:
        values = resolve({"dataset": dataset, "backbone": "vit_large_patch16_384"}).values
        assert {name: values[name] for name in names_of(DATA)}.items() <= dataset_defaults(dataset).items()
        assert (values["d_model"], values["n_layers"], values["optimizer"]) == (1024, 24, "sgd")
    values = make({"backbone": "deit_tiny_patch16_224"}).values
    assert {name: values[name] for name in names_of(BACKBONE)} == backbone_settings("deit_tiny_patch16_224")


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
        values = resolve(given, RunConfig().with_values(**saved)).values
        assert {name: values[name] for name in expected} == expected, given


def test_a_crop_may_be_higher_or_wider(tmp_path):
    config = make({"crop_size": (32, 64), "window_size": (32, 64), "window_stride": (16, 64)})
    assert config.grid == (32 // config.net.patch_size, 64 // config.net.patch_size)
    config.write(tmp_path)
    variant, found = read_variant(tmp_path), RunConfig.read(tmp_path)
    assert variant["net_kwargs"]["image_size"] == [32, 64] == variant["dataset_kwargs"]["crop_size"]
    assert (found.data.crop_size, found.inference.window_stride) == ((32, 64), (16, 64))
    resolve({"crop_size": (32, 64)}, found, resume=True)


def test_a_resumed_run_keeps_what_its_weights_belong_to():
    base = make(EVERY | {"start_thresh": None, "curric_warmup": None, "curric_period": None})
    for name, value in (("n_layers", 3), ("optimizer", "sgd"), ("batch_size", 2), ("crop_size", 48)):
        with pytest.raises(ValueError, match=f"--{name.replace('_', '-')}: .*--finetune"):
            resolve({name: value}, base, resume=True)
        resolve({name: value}, base)
    assert resolve({"epochs": 99, "n_layers": 2}, base, resume=True).schedule.epochs == 99


def test_merging_is_completed_and_checked_for_the_network():
    config = make({"n_layers": 24}, parse(["--patch-type", "algm"]))
    options = options_of(config)
    assert (config.merging.method, [*options["layers"]], options["window"]) == ("algm", [1, 7], (2, 2))
    for words, hint in (("algm --selected-layers 1 99", "1 to 12"), ("algm --merging-window-size 9 99", "window")):
        with pytest.raises(ValueError, match=hint):
            make({}, parse(["--patch-type", *words.split()]))


def test_a_curriculum_belongs_to_its_method():
    times = {"start_thresh": 0.95, "curric_warmup": 2, "curric_period": 3, "epochs": 17}
    base = make(times, GRAPH)
    assert curriculum(resolve({}, base, resume=True)).epochs == 17
    assert curriculum(resolve({"threshold": 0.94}, base)).target == 0.94
    for method in ("algm", "pure"):
        other = resolve({"patch_type": method}, base)
        assert curriculum(other) is None and other.schedule.start_thresh is None
    tuned = resolve({}, base.for_finetuning())
    assert curriculum(tuned) is None and options_of(tuned)["threshold"] == 0.9
    for given, method, hint in (
        (times | {"epochs": 16}, GRAPH, "more --epochs"),
        (times | {"curric_period": None}, GRAPH, "--curric-period"),
        (times, {}, "--threshold"),
        (times, {"patch_type": "tome"}, "--threshold"),
        (times | {"start_thresh": 0.5}, GRAPH, "below"),
    ):
        with pytest.raises(ValueError, match=hint):
            make(given, method)


def test_fine_tuning_takes_over_network_data_and_merging_but_no_schedule():
    values = resolve({"learning_rate": 0.1, "epochs": 3}, make(EVERY, GRAPH).for_finetuning()).values
    kept = {"d_model": 64, "crop_size": 32, "window_stride": 16, "decoder_dropout": 0.35}
    assert {name: values[name] for name in kept} == kept
    assert (values["optimizer"], values["weight_decay"], values["warmup_epochs"]) == ("sgd", 0.0, 0)
    assert (values["epochs"], values["epochs_before"]) == (3, 30)


def test_the_settings_of_a_decoder_stay_with_it():
    base = make({"decoder": "eomt", "decoder_blocks": 2})
    assert base.net_kwargs["decoder"] == {"name": "eomt", "n_blocks": 2, "n_queries": 100}
    assert resolve({}, base).net == base.net
    assert resolve({"decoder": "linear"}, base).net_kwargs["decoder"] == {"name": "linear"}
    with pytest.raises(ValueError, match="--decoder-blocks"):
        resolve({"decoder": "linear", "decoder_blocks": 2}, base)


def test_learned_parts_stay_in_a_model_that_has_some():
    base = make({}, {"patch_type": "dtem"})
    assert base.net.reduction["name"] == "dtem"
    for method in ({}, {"patch_type": "pure"}, {"patch_type": "graph"}):
        assert resolve(method, base).net.reduction == base.net.reduction
    with pytest.raises(ValueError, match="other"):
        resolve({}, base.with_values(reduction={"name": "other"}))


def test_what_a_file_says_of_merging_is_kept_as_it_stands():
    variant = {"net_kwargs": {"backbone": "b"}, "dataset_kwargs": {"patch_type": "later", "its_option": [1]}}
    config = RunConfig.from_variant(variant)
    assert config.merging.entries == variant["dataset_kwargs"]
    assert config.to_variant()["dataset_kwargs"] == {"split": "train", **variant["dataset_kwargs"]}


def test_missing_and_unknown_names_are_refused():
    for given, hint in (
        ({"dataset": "shapes"}, "--backbone"),
        ({"backbone": "vit_tiny_patch16_384"}, "--dataset"),
        (BASE | {"dataset": "nosuch"}, "nosuch"),
        (BASE | {"backbone": "vit_nosuch"}, "vit_tiny_patch16_384"),
        (BASE | {"backbone": "resnet18"}, "not a plain ViT"),
        (BASE | {"decoder": "nosuch"}, "mask_transformer"),
        (BASE | {"scheduler": "nosuch"}, "polynomial"),
        (BASE | {"learning_rat": 1}, "did you mean learning_rate"),
        (BASE | {"threshold": 0.9}, "patch-type"),
        (BASE | {"warmup_epochs": 20}, "fewer than the 20"),
        (BASE | {"batch_size": 4, "accumulate": 3}, "divides the batch size 4"),
        (BASE | {"decoder": "eomt", "patience": 3}, "--patience"),
        (BASE | {"loss": "cross_entropy,nosuch"}, "cross_entropy, focal, dice"),
        (BASE | {"loss": "dice,dice"}, "each once"),
        (BASE | {"bands": (1,)}, "folder, not for shapes"),
        (BASE | {"loss": "dice", "class_weights": "auto"}, "Dice counts"),
        (BASE | {"decoder": "segvit", "class_weights": "auto"}, "segvit has a loss of its own"),
        (BASE | {"decoder": "eomt", "loss": "focal"}, "eomt has a loss of its own"),
    ):
        with pytest.raises(ValueError, match=hint):
            resolve(given)


def test_a_schedule_counts_epochs_or_updates():
    config = make({"updates": 200, "eval_every": 50})
    assert (config.schedule.epochs, config.schedule.eval_freq) == (4, 1)
    assert make({"updates": 200}).schedule.eval_every == 20
    again = RunConfig.from_variant(config.to_variant())
    assert again == config == resolve({}, again, resume=True)
    assert resolve({"updates": 300}, again, resume=True).schedule.epochs == 6
    assert resolve({"epochs": 9}, again).schedule.updates is None
    for given, base, hint in (
        ({"updates": 210, "eval_every": 50}, None, "a multiple of --eval-every, which is 50"),
        ({"updates": 25}, None, "a multiple of --eval-every, which is 2"),
        ({"eval_every": 50}, None, "give --updates too"),
        ({"epochs": 9}, again, "--epochs: a resumed run keeps"),
        ({"updates": 200, "eval_every": 40}, again, "--eval-every: a resumed run keeps"),
        ({"updates": 200, "epochs": 9}, make(), "--updates: a resumed run keeps"),
    ):
        with pytest.raises(ValueError, match=hint):
            make(given, None, base, resume=base is not None)


def test_pixels_are_normalized_as_the_weights_were_trained():
    known = {"eva02_small_patch14_224": "clip", "vit_base_patch16_clip_224": "clip", "vit_small_patch14_dinov2": "deit"}
    known |= {"vit_tiny_patch16_224": "vit", "vit_tiny_patch16_384": "vit"}
    for name, expected in known.items():
        assert make({"backbone": name}).normalization == expected, name
    config = make({"mean": (0.1, 0.2, 0.3)})
    assert config.normalization == Normalization((0.1, 0.2, 0.3), (0.5, 0.5, 0.5))
    again = RunConfig.from_variant(config.to_variant()).for_finetuning()
    assert resolve({}, again).normalization == config.normalization
    assert resolve({"normalization": "deit"}, again).normalization == "deit"


def test_every_vit_of_timm_has_its_own_numbers():
    """Of the default weights of every name; what has no name is written out."""
    for name in timm.list_models("vit_*") + timm.list_models("eva*") + timm.list_models("deit*"):
        cfg = timm.get_pretrained_cfg(name)
        if cfg is not None:
            named = name_of_normalization(cfg.mean, cfg.std)
            expected = Normalization(tuple(cfg.mean), tuple(cfg.std))
            assert np.allclose(get_normalization(named or expected), expected, atol=1e-3), name


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"learning_rate": 1e-6, "minlearning_rate": 1e-5}, "--minlearning-rate"),
        ({"crop_size": 2048, "im_size": 512}, "--crop-size 2048"),
        ({"value_range": (9.0, 1.0)}, "--value-range"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(given, hint):
    with pytest.raises(ValueError, match=hint):
        make(given)


def test_a_rate_below_the_usual_end_stays_where_it_is():
    schedule = make({"learning_rate": 1e-6}).schedule
    assert schedule.minlearning_rate == 1e-6 and make({}).schedule.minlearning_rate == 1e-5


def test_factors_of_nothing_are_refused():
    for flag in ("--encoder-lr-mult", "--layer-decay"):
        with pytest.raises(click.ClickException, match=flag):
            train.main.make_context("train", ["--log-dir", "unused", flag, "0"])
    with pytest.raises(ValueError, match=r"encoder_lr_mult .* is 0"):
        RunConfig.from_variant({"net_kwargs": {}, "optimizer_kwargs": {"encoder_lr_mult": 0}})


def test_the_last_of_two_sizes_counts_and_fractions_are_no_whole_numbers(tmp_path):
    words = ["--log-dir", "unused", "--crop-size", "64", "32", "--epochs", "3", "--crop-size", "48"]
    assert train.main.make_context("train", words).params["crop_size"] == 48
    for text in ("epochs: 64.5", "crop_size: [64, 48.5]", "epochs: true"):
        (tmp_path / "recipe.yml").write_text(text)
        with pytest.raises(click.ClickException, match="whole number"):
            train.main.make_context("train", ["--log-dir", "unused", "--config", str(tmp_path / "recipe.yml")])
