"""From what a user gives, and the run that it starts from, to a complete and checked `RunConfig`; pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from typing import Any

import patch
from segm import merging
from segm.config import BACKBONE, CURRICULUM, DATA, LOSSES, SCHEDULERS, SETTINGS, Merging, Net, RunConfig, load_config
from segm.data.factory import dataset_defaults
from segm.data.images import name_of_normalization
from segm.merging import PURE
from segm.sizes import pair, short, smaller

EPOCHS, UPDATES = ("epochs", "eval_freq"), ("updates", "eval_every")  # two ways to say how long
DECODER_SETTINGS = {"decoder_dropout": "dropout", "decoder_blocks": "n_blocks"}
DECODER_SETTINGS |= {"decoder_layers": "n_layers", "decoder_drop_path": "drop_path_rate"}  # setting -> key of its file


def resolve(overrides: Mapping[str, Any], base: RunConfig | None = None, *, resume: bool = False) -> RunConfig:
    """Complete and check the settings of a training.

    What is given goes first, then what the base says, then the defaults of data set and backbone. The options of
    merging and the curriculum that the base says count for the same method alone.

    Args:
        overrides: name -> value, None where not given: settings (`segm.config`), `patch_type`, and options of the
            method, as `patch.apply` takes them.
        base: the run that is resumed, or `RunConfig.for_finetuning` of the one to start from; None: there is none.
        resume: whether the base's own run goes on.

    Raises:
        ValueError: something is missing, unknown, not allowed, or would make a resumed run another run.
    """
    base = base or RunConfig()
    given = {name: value for name, value in overrides.items() if value is not None}
    own = {name: given.pop(name) for name in [*given] if name not in SETTINGS}
    saved = {name: value for name, value in base.values.items() if value is not None}
    _check_names(own)
    if resume:
        _check_resumable(given, saved)
    method, options = merging.choose(own, base.merging.entries)
    if given.get("train_only", saved.get("train_only")) is not None:
        options = _learning(method, options)
    if method in (PURE, None) or method != base.merging.method:
        saved = {name: value for name, value in saved.items() if name not in CURRICULUM}
    config = base.with_values(**(dict.fromkeys(CURRICULUM) | _complete(given, saved)))
    config = _with_decoder(config, base, given)
    if config.schedule.cache_features:
        _check_cacheable(config, method)
    if method != PURE:
        options = patch.check(method, config.net.n_layers, config.grid, **options)
    entries = merging.to_variant(method, options)
    config = replace(config, merging=Merging(entries.pop("patch_type"), entries))
    config = config.with_values(reduction=_reduction(method, options, base.net.reduction))
    curriculum(config)
    return config


def curriculum(config: RunConfig) -> patch.Curriculum | None:
    """The curriculum of a training's threshold; None: there is none.

    Raises:
        ValueError: a curriculum without one of its settings, that ends after the training, or see `patch.Curriculum`.
    """
    schedule = config.schedule
    start, warmup, period = settings = (schedule.start_thresh, schedule.curric_warmup, schedule.curric_period)
    if settings == (None, None, None):
        return None
    threshold = merging.read_variant(config.merging.entries)[1].get("threshold")
    if None in settings or threshold is None:
        raise ValueError("a curriculum takes --threshold, --start-thresh, --curric-warmup and --curric-period")
    found = patch.Curriculum(start, threshold, warmup, period)
    if found.epochs > schedule.epochs:
        raise ValueError(
            f"the curriculum reaches its threshold and trains with it in {found.epochs} epochs, "
            f"not in {schedule.epochs}: give more --epochs or a shorter curriculum"
        )
    return found


def backbone_settings(name: str) -> dict[str, Any]:
    """Patch size, width, heads, layers, normalization of a released backbone or of any ViT of timm.

    Raises:
        ValueError: timm does not know the name either.
    """
    released = load_config("backbones")
    if name in released:
        return released[name]
    import timm  # here, for it is slow to import

    from segm.model.encoder import ALIASES

    if not timm.is_model(ALIASES.get(name, name)):
        raise ValueError(f"unknown backbone {name!r}: use a released name ({', '.join(released)}) or a ViT of timm")
    model: Any = timm.create_model(name, pretrained=False, device="meta")
    if not hasattr(model, "blocks") or not hasattr(model, "patch_embed"):
        raise ValueError(f"backbone {name} is a {type(model).__name__}, not a plain ViT")
    if not hasattr(model.blocks[0], "attn"):
        kind = type(model.blocks[0]).__name__
        raise ValueError(f"backbone {name} has blocks of another kind ({kind}), choose a plain ViT of timm")
    mean, std = tuple(model.pretrained_cfg["mean"]), tuple(model.pretrained_cfg["std"])
    normalization = name_of_normalization(mean, std)
    return {
        "patch_size": model.patch_embed.patch_size[0],
        "d_model": model.embed_dim,
        "n_heads": model.blocks[0].attn.num_heads,
        "n_layers": len(model.blocks),
        "normalization": normalization or "vit",
        "mean": None if normalization else mean,
        "std": None if normalization else std,
        "distilled": hasattr(model, "dist_token"),
    }


def _check_names(options: Mapping[str, Any]) -> None:
    """Raise a ValueError for a name that is neither a setting nor an option of any method."""
    known = {"patch_type", *(name for method in patch.METHODS.values() for name in method.options)}
    for name in options.keys() - known:
        similar = get_close_matches(name, [*SETTINGS, *known], 3)
        hint = f": did you mean {' or '.join(similar)}?" if similar else f": settings are {', '.join(SETTINGS)}"
        raise ValueError(f"unknown setting {name!r}{hint}")


def _check_resumable(given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    frozen = [name for name, (_, entry) in SETTINGS.items() if entry.metadata.get("frozen_on_resume")]
    changed = [name for name in frozen if name in given and given[name] != saved.get(name)]
    counts_updates = "updates" in saved
    if not counts_updates or "updates" not in given:
        other = EPOCHS if counts_updates else UPDATES
        changed += [name for name in other if name in given and name not in changed]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise ValueError(f"{flags}: a resumed run keeps these; start a new one with --finetune to change them")


def _learning(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method whose learned parts alone are to be trained."""
    entry = None if method == PURE else patch.find(method)
    if entry is None or entry.modules is None:
        raise ValueError(f"--train-only method: {method} has nothing to learn; name another method with --patch-type")
    return {**options} if entry.enabled_by is None else {entry.enabled_by: True, **options}


def _complete(given: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting: what was given, then what was saved, then the defaults.

    Raises:
        ValueError: no data set or backbone, or an unknown one; settings that contradict each other.
    """
    if given.keys() & {*EPOCHS} and "updates" not in given:
        saved = {name: value for name, value in saved.items() if name not in UPDATES}
    chosen = {**saved, **given}
    for name in ("dataset", "backbone"):
        if name not in chosen:
            raise ValueError(f"no {name}: give --{name} or a --config that names one")
    backbone, data = backbone_settings(chosen["backbone"]), dataset_defaults(chosen["dataset"])
    for name, owner in (("backbone", BACKBONE), ("dataset", DATA)):
        if chosen[name] != saved.get(name):
            chosen = {key: value for key, value in chosen.items() if key not in _of(owner) or key in given}
    if "d_model" in given and "n_heads" not in given:  # heads of 64 channels, as in every ViT
        chosen["n_heads"] = max(1, given["d_model"] // 64)
    if "normalization" in given:
        chosen |= {name: given.get(name) for name in ("mean", "std")}
    if "crop_size" in given:  # a window of the training's size, unless one is given
        data = data | {"window_size": given["crop_size"]}
        chosen = {k: v for k, v in chosen.items() if k not in ("window_size", "window_stride") or k in given}
    defaults = {name: entry.metadata["default"] for name, (_, entry) in SETTINGS.items()}
    defaults |= {name: backbone.get(name) for name in _of(BACKBONE)} | {name: data[name] for name in _of(DATA)}
    settings = {**defaults, **chosen}
    freezes, frozen = ((one.get("freeze_encoder") or one.get("train_only")) for one in (given, saved))
    if freezes and not frozen and "drop_path" not in given:
        settings["drop_path"] = 0.0  # a frozen encoder learns nothing from its noise
    if "window_stride" not in given:
        settings["window_stride"] = short(smaller(settings["window_stride"], settings["window_size"]))
    patch_side = settings["patch_size"]  # the embedding of positions has those of the padded crop
    image_size = tuple(-(-side // patch_side) * patch_side for side in pair(settings["crop_size"]))
    settings |= {"image_size": image_size, "eval_size": settings["im_size"]}
    settings |= _in_updates(settings["updates"], settings["eval_every"])
    if "minlearning_rate" not in chosen:
        settings["minlearning_rate"] = min(settings["minlearning_rate"], settings["learning_rate"])
    _check_together(settings)
    return settings


def _in_updates(updates: int | None, every: int | None) -> dict[str, int]:
    """The settings of a schedule in updates: an epoch is what lies between two evaluations.

    Raises:
        ValueError: the updates are no multiple of those between two evaluations, or not given.
    """
    if updates is None:
        if every is not None:
            raise ValueError(f"--eval-every {every}: give --updates too, or --eval-freq, which counts epochs")
        return {}
    every = every or max(updates // 10, 1)
    if updates % every:
        raise ValueError(f"--updates {updates}: give a multiple of --eval-every, which is {every}")
    return {"eval_every": every, "epochs": updates // every, "eval_freq": 1}


def _of(owner: str) -> list[str]:
    """Names of the settings that have the defaults of `BACKBONE` or `DATA`."""
    return [name for name, (_, entry) in SETTINGS.items() if entry.metadata.get("default_from") == owner]


def _check_together(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError for settings that contradict each other."""
    low, high = settings["scale_range"]
    if low > high:
        raise ValueError(f"--scale-range {low:g} {high:g}: give the lower factor first")
    rate, lowest = settings["learning_rate"], settings["minlearning_rate"]
    if rate < lowest:
        raise ValueError(f"--learning-rate {rate:g} is below --minlearning-rate {lowest:g}, at which it ends")
    side, largest = min(pair(settings["crop_size"])), settings["im_size"] * high
    if side < settings["patch_size"]:
        raise ValueError(f"--crop-size {side}: a patch alone has {settings['patch_size']} pixels (--patch-size)")
    if side > largest:
        raise ValueError(
            f"--crop-size {side}: images of {settings['im_size']} pixels (--im-size), {high:g} times enlarged at most "
            f"(--scale-range), never fill it: give a crop of at most {largest:g} pixels, or larger images"
        )
    if settings["value_range"] is not None and settings["value_range"][0] >= settings["value_range"][1]:
        raise ValueError("--value-range: give the lower value first")
    if settings["bands"] is not None and settings["dataset"] != "folder":
        raise ValueError(f"--bands is for one's own pictures, --dataset folder, not for {settings['dataset']}")
    if settings["scheduler"] not in SCHEDULERS:
        raise ValueError(f"unknown scheduler {settings['scheduler']!r}: choose one of {', '.join(SCHEDULERS)}")
    if settings["batch_size"] % settings["accumulate"]:
        size, parts = settings["batch_size"], settings["accumulate"]
        raise ValueError(f"--accumulate {parts}: give a number that divides the batch size {size}")
    if settings["patience"] is not None and settings["decoder"] == "eomt":
        raise ValueError("--patience: eomt is evaluated as it will be at its end alone, so its mIoU says little before")
    _check_loss(settings["loss"].split(","), settings["class_weights"], settings["decoder"])
    warmup, epochs = settings["warmup_epochs"], settings["epochs"]
    if not 0 <= warmup < epochs:
        raise ValueError(f"warm-up of {warmup} epochs: give fewer than the {epochs} epochs of the training")


def _check_loss(parts: Sequence[str], weights: object, decoder: str) -> None:
    """Raise a ValueError for losses that there are not, and for settings of a loss that the decoder does not have."""
    if not set(parts) <= {*LOSSES} or len({*parts}) < len(parts):
        raise ValueError(f"--loss {','.join(parts)}: choose from {', '.join(LOSSES)}, each once")
    if decoder in ("segvit", "eomt") and (parts != ["cross_entropy"] or weights is not None):
        raise ValueError(f"--loss, --class-weights: the decoder {decoder} has a loss of its own")
    if weights is not None and parts == ["dice"]:
        raise ValueError("--class-weights: Dice counts all classes alike; add another --loss, such as cross_entropy")


def _with_decoder(config: RunConfig, base: RunConfig, given: Mapping[str, Any]) -> RunConfig:
    """The settings of the decoder: what was given, then what the base says of the same decoder, then its defaults.

    Raises:
        ValueError: unknown decoder, or a setting that it does not have.
    """
    name, known = config.net.decoder, load_config("decoders")
    if name not in known:
        raise ValueError(f"unknown decoder {name!r}: choose one of {', '.join(known)}")
    if "decoder_blocks" in given and "n_blocks" not in known[name]:
        raise ValueError(f"--decoder-blocks: the decoder {name} reads the end of the encoder alone")
    defaults, kept = dict(known[name]), base.net if base.net.decoder == name else Net()
    values: dict[str, Any] = {}
    for setting, key in DECODER_SETTINGS.items():
        default, saved = defaults.pop(key, None), getattr(kept, setting)
        own = given.get(setting) if default is not None else None
        values[setting] = next((value for value in (own, saved, default) if value is not None), None)
    net = replace(config.net, decoder_kwargs={**defaults, **kept.decoder_kwargs})
    return replace(config, net=net).with_values(**values)


def _check_cacheable(config: RunConfig, method: str) -> None:
    """Raise a ValueError unless the features of an image are the same in every epoch, and a tensor."""
    net, optim = config.net, config.optim
    if not optim.freeze_encoder or optim.train_only is not None or net.dropout or net.drop_path:
        raise ValueError("--cache-features: the encoder has to stay as it is: give --freeze-encoder, without dropout")
    if net.decoder not in ("linear", "mask_transformer"):
        raise ValueError(f"--cache-features: the decoder {net.decoder} reads other features than are kept")
    if method != PURE:
        raise ValueError(f"--cache-features: merging with {method} is not kept: train without merging, then --finetune")


def _reduction(method: str, options: Mapping[str, Any], saved: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Learned parts, which stay in a model that has some."""
    wanted = merging.learned_parts(method, options)
    if saved and wanted and saved != wanted:
        raise ValueError(f"the run to start from learned with {saved}, not with {wanted}: start from one without")
    return wanted or saved
