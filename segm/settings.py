"""Training settings: from options, a saved `variant.yml` and the data set's defaults to one `variant.yml`."""

import timm

from segm.config import load_config
from segm.data.defaults import dataset_defaults
from segm.model.encoder import ALIASES
from segm.optim import MOMENTUM, POWER

# option of train.py -> its place in variant.yml (the layout of Segmenter)
PLACES = {
    "dataset": ("dataset_kwargs", "dataset"),
    "im_size": ("dataset_kwargs", "image_size"),
    "crop_size": ("dataset_kwargs", "crop_size"),
    "normalization": ("dataset_kwargs", "normalization"),
    "num_workers": ("dataset_kwargs", "num_workers"),
    "backbone": ("net_kwargs", "backbone"),
    "decoder": ("net_kwargs", "decoder", "name"),
    "patch_size": ("net_kwargs", "patch_size"),
    "d_model": ("net_kwargs", "d_model"),
    "n_heads": ("net_kwargs", "n_heads"),
    "n_layers": ("net_kwargs", "n_layers"),
    "dropout": ("net_kwargs", "dropout"),
    "decoder_dropout": ("net_kwargs", "decoder", "dropout"),
    "drop_path": ("net_kwargs", "drop_path_rate"),
    "optimizer": ("optimizer_kwargs", "opt"),
    "scheduler": ("optimizer_kwargs", "sched"),
    "learning_rate": ("optimizer_kwargs", "lr"),
    "minlearning_rate": ("optimizer_kwargs", "min_lr"),
    "weight_decay": ("optimizer_kwargs", "weight_decay"),
    "warmup_epochs": ("optimizer_kwargs", "warmup_epochs"),
    "start_factor": ("optimizer_kwargs", "start_factor"),
    "epochs": ("algorithm_kwargs", "num_epochs"),
    "eval_freq": ("algorithm_kwargs", "eval_freq"),
    "batch_size": ("world_batch_size",),
    "window_size": ("inference_kwargs", "window_size"),
    "window_stride": ("inference_kwargs", "window_stride"),
    "amp": ("amp",),
    "seed": ("seed",),
}
# option of the threshold curriculum -> its key in dataset_kwargs
CURRICULUM = {
    "start_thresh": "start_threshold",
    "curric_warmup": "curriculum_start",
    "curric_period": "curriculum_period",
}
# What cannot change when a run is resumed: its weights and the optimizer's state belong to these.
FIXED = ("dataset", "backbone", "decoder", "patch_size", "d_model", "n_heads", "n_layers", "crop_size", "optimizer")
FIXED += ("weight_decay", "batch_size")
DATA_SETTINGS = (
    "im_size",
    "crop_size",
    "window_size",
    "window_stride",
    "batch_size",
    "epochs",
    "eval_freq",
    "learning_rate",
)
BACKBONE_SETTINGS = ("patch_size", "d_model", "n_heads", "n_layers", "normalization")
DEFAULTS = {
    "decoder": "mask_transformer",
    "dropout": 0.0,
    "drop_path": 0.1,
    "optimizer": "sgd",
    "scheduler": "polynomial",
    "minlearning_rate": 1e-5,
    "weight_decay": 0.0,
    "warmup_epochs": 0,
    "start_factor": 1.0,
    "amp": False,
    "seed": 0,
    "num_workers": 2,
}


def read_settings(variant):
    """The options of train.py that a `variant.yml` records, as a flat dict without missing ones."""
    settings = {}
    for option, place in PLACES.items():
        value = variant
        for key in place:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            settings[option] = value
    return settings


def finetuning_defaults(variant):
    """What a new run takes over from the one that it starts from: network, data, merging; no schedule."""
    data = {k: v for k, v in variant.get("dataset_kwargs", {}).items() if k not in CURRICULUM.values()}
    kept = {name: variant[name] for name in ("net_kwargs", "inference_kwargs") if name in variant}
    return kept | {"dataset_kwargs": data}


def check_resumable(given, saved):
    """Raise a ValueError if an option would make a resumed run another run."""
    changed = [name for name in FIXED if name in given and given[name] != saved.get(name)]
    if changed:
        flags = ", ".join("--" + name.replace("_", "-") for name in changed)
        raise ValueError(f"{flags}: a resumed run keeps these; start a new one with --finetune to change them")


def complete_settings(given, saved):
    """Settings of a training: what was given, then what was saved, then the defaults of data set and backbone.

    Args:
        given: option -> value, without options that were not given.
        saved: the same from a `variant.yml`, or {}.

    Returns:
        A dict with every key of `PLACES` (`decoder_dropout` only if it is not the decoder's own), and `distilled`.

    Raises:
        ValueError: no data set or backbone, or an unknown one.
    """
    chosen = saved | given
    for name in ("dataset", "backbone"):
        if name not in chosen:
            raise ValueError(f"no {name}: give --{name} or a --config that names one")
    backbone = backbone_settings(chosen["backbone"])
    if given.get("backbone", saved.get("backbone")) != saved.get("backbone"):
        chosen = {name: value for name, value in chosen.items() if name not in BACKBONE_SETTINGS or name in given}
    if given.get("dataset", saved.get("dataset")) != saved.get("dataset"):
        chosen = {name: value for name, value in chosen.items() if name not in DATA_SETTINGS or name in given}
    if "d_model" in given and "n_heads" not in given:  # heads of 64 channels, as in every ViT
        chosen = chosen | {"n_heads": max(1, given["d_model"] // 64)}
    data = dataset_defaults(chosen["dataset"])
    data = {name: value for name, value in data.items() if name in PLACES}
    if "crop_size" in given:  # a window of the training's size, unless one is given
        data["window_size"] = given["crop_size"]
        chosen = {k: v for k, v in chosen.items() if k not in ("window_size", "window_stride") or k in given}
    settings = DEFAULTS | {k: v for k, v in backbone.items() if k != "image_size"} | data | chosen
    if "window_stride" not in given:
        settings["window_stride"] = min(settings["window_stride"], settings["window_size"])
    return settings


def backbone_settings(name):
    """Patch size, width, heads, layers, normalisation of a released backbone or of any ViT of timm.

    Raises:
        ValueError: timm does not know the name either.
    """
    released = load_config("backbones")
    if name in released:
        return released[name]
    if not timm.is_model(ALIASES.get(name, name)):
        raise ValueError(f"unknown backbone {name!r}: use a released name ({', '.join(released)}) or a ViT of timm")
    model = timm.create_model(name, pretrained=False, device="meta")
    if not hasattr(model, "blocks") or not hasattr(model, "patch_embed"):
        raise ValueError(f"backbone {name} is a {type(model).__name__}, not a plain ViT")
    half = all(abs(value - 0.5) < 1e-6 for value in model.pretrained_cfg["mean"])
    return {
        "patch_size": model.patch_embed.patch_size[0],
        "d_model": model.embed_dim,
        "n_heads": model.blocks[0].attn.num_heads,
        "n_layers": len(model.blocks),
        "normalization": "vit" if half else "deit",
        "distilled": hasattr(model, "dist_token"),
    }


def build_variant(settings, saved_decoder=None):
    """The content of `variant.yml`, but for the number of classes and the merging.

    Args:
        settings: from `complete_settings`.
        saved_decoder: the decoder's `net_kwargs` of the run that goes on, or None.
    """
    variant = {"version": "normal"}
    for option, place in PLACES.items():
        if option in settings:
            section = variant
            for key in place[:-1]:
                section = section.setdefault(key, {})
            section[place[-1]] = settings[option]
    crop = settings["crop_size"]
    variant["net_kwargs"] |= {
        "image_size": [crop, crop],
        "distilled": settings["distilled"],
        "normalization": settings["normalization"],
    }
    variant["net_kwargs"]["decoder"] = _decoder_settings(settings, saved_decoder)
    variant["inference_kwargs"]["im_size"] = settings["im_size"]
    variant["dataset_kwargs"] |= {"split": "train", "batch_size": settings["batch_size"]}
    variant["algorithm_kwargs"] |= {"batch_size": settings["batch_size"], "start_epoch": 0}
    variant["optimizer_kwargs"] |= {"momentum": MOMENTUM, "poly_power": POWER, "epochs": settings["epochs"]}
    return variant


def _decoder_settings(settings, saved):
    """`net_kwargs` of the decoder: its defaults, then what was saved for the same decoder, then what was given."""
    name, known = settings["decoder"], load_config("decoders")
    if name not in known:
        raise ValueError(f"unknown decoder {name!r}: choose one of {', '.join(known)}")
    decoder = {"name": name, **known[name]}
    if saved and saved.get("name") == name:
        decoder |= saved
    if "dropout" in decoder and "decoder_dropout" in settings:
        decoder["dropout"] = settings["decoder_dropout"]
    return decoder
