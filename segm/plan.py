"""The plan of a training: its settings, each described once, and its merging; from flags and files to `variant.yml`."""

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

import click
import timm

from patch import Curriculum, check, find
from segm.cli import POSITIVE, RATE, Sides
from segm.config import config_dir, load_config
from segm.data import DATASETS
from segm.data.factory import dataset_defaults
from segm.errors import brief, one_line
from segm.merging import PURE, choose, learned_parts, to_variant
from segm.model.decoder import DECODERS
from segm.model.encoder import ALIASES
from segm.optim import MOMENTUM, OPTIMIZERS, POWER, SCHEDULERS
from segm.sizes import pair, short, smaller
from segm.yaml_files import read_yaml

BACKBONE, DATA, CURRICULUM = "the backbone's", "the data set's", "the curriculum's"
METHOD = "method"  # what may be trained alone
COUNT, SHARE = click.IntRange(min=0), click.FloatRange(0, 1)


def setting(type: Any, places: str, help: str = "", default: Any = None, **more: Any) -> Any:
    """A field of `Settings`.

    Args:
        type: what click checks the value by; None: it has no flag.
        places: where it stands in `variant.yml`, as in "net.d_model" for d_model in net_kwargs; the first of several
            places is read.
        help: its meaning, with its unit.
        default: None: see `of`.
        more: `of`: whose default it has, or whose part it is: `BACKBONE`, `DATA`, `CURRICULUM`;
            `shown`: the default in --help, where it is not the default itself;
            `kept`: whether a resumed run has to keep it: its weights and the optimizer's state belong to it;
            `flag`: other than its name;
            `cls`, `nargs`: of click's option.
    """
    paths = [place.replace(".", "_kwargs.", 1).split(".") for place in places.split()]
    return field(default=default, metadata={"type": type, "help": help, "places": paths, **more})


@dataclass(frozen=True)
class Settings:
    """The settings of a training, all but its merging."""

    dataset: str = setting(
        click.Choice(DATASETS), "dataset.dataset", "Data set; all but shapes are read from $DATASET.", kept=True
    )
    backbone: str = setting(str, "net.backbone", "Released name, or any plain ViT of timm.", kept=True)
    decoder: str = setting(click.Choice(DECODERS), "net.decoder.name", default="mask_transformer", kept=True)
    patch_size: int = setting(POSITIVE, "net.patch_size", "Pixels per patch side.", of=BACKBONE, kept=True)
    d_model: int = setting(POSITIVE, "net.d_model", "Width.", of=BACKBONE, kept=True)
    n_heads: int = setting(
        POSITIVE, "net.n_heads", "Attention heads.", of=BACKBONE, kept=True, shown=f"{BACKBONE}, or width / 64"
    )
    n_layers: int = setting(POSITIVE, "net.n_layers", "Encoder blocks.", of=BACKBONE, kept=True)
    distilled: bool = setting(None, "net.distilled", of=BACKBONE)
    im_size: int = setting(
        POSITIVE, "dataset.image_size inference.im_size", "Shorter side of the images, pixels.", of=DATA
    )
    crop_size: int | tuple[int, int] = setting(
        POSITIVE, "dataset.crop_size", "Training crop, pixels.", of=DATA, kept=True, cls=Sides
    )
    scale_range: tuple[float, float] = setting(
        click.FloatRange(min=0, min_open=True),
        "dataset.scale_range",
        "Training images are resized at random by a factor in this range.",
        (0.5, 2.0),
        shown="0.5 2.0",
        nargs=2,
    )
    window_size: int | tuple[int, int] = setting(
        POSITIVE, "inference.window_size", "Sliding window, pixels.", of=DATA, shown=f"{DATA}, or crop size", cls=Sides
    )
    window_stride: int | tuple[int, int] = setting(
        POSITIVE, "inference.window_stride", "Its stride, pixels.", of=DATA, cls=Sides
    )
    normalization: str = setting(
        click.Choice(["vit", "deit"]), "dataset.normalization net.normalization", "Pixel mean and std.", of=BACKBONE
    )
    optimizer: str = setting(
        click.Choice(OPTIMIZERS), "optimizer.opt", default="sgd", kept=True, shown=f"sgd, momentum {MOMENTUM}"
    )
    scheduler: str = setting(click.Choice(SCHEDULERS), "optimizer.sched", "polynomial: per iteration.", "polynomial")
    learning_rate: float = setting(RATE, "optimizer.lr", of=DATA)
    minlearning_rate: float = setting(RATE, "optimizer.min_lr", "Where the schedule ends.", 1e-5)
    weight_decay: float = setting(RATE, "optimizer.weight_decay", default=0.0, kept=True)
    encoder_lr_mult: float = setting(
        RATE, "optimizer.encoder_lr_mult", "Learning rate of the encoder, × learning rate.", 1.0, kept=True
    )
    layer_decay: float = setting(
        SHARE,
        "optimizer.layer_decay",
        "Learning rate of each layer of the encoder, × that of the next.",
        1.0,
        kept=True,
    )
    freeze_encoder: bool = setting(
        bool,
        "optimizer.freeze_encoder",
        "Train the decoder alone.",
        False,
        flag="--freeze-encoder/--no-freeze-encoder",
        kept=True,
    )
    cache_features: int = setting(
        COUNT,
        "algorithm.cache_features",
        "With --freeze-encoder: versions of each image whose features are computed once; 0: none.",
        0,
        kept=True,
    )
    train_only: str | None = setting(
        click.Choice([METHOD]),
        "optimizer.train_only",
        "Train the learned parts of the merging method alone.",
        kept=True,
    )
    warmup_epochs: int = setting(COUNT, "optimizer.warmup_epochs", "Epochs of linear warm-up.", 0)
    start_factor: float = setting(RATE, "optimizer.start_factor", "Where the warm-up starts, × learning rate.", 1.0)
    dropout: float = setting(SHARE, "net.dropout", "In the encoder.", 0.0)
    decoder_dropout: float | None = setting(SHARE, "net.decoder.dropout", "In the decoder.", shown="0.1")
    decoder_blocks: int | None = setting(
        POSITIVE,
        "net.decoder.n_blocks",
        "Last blocks of the encoder, which linear_bn reads or queries of eomt join.",
        shown="1; 3",
    )
    drop_path: float = setting(SHARE, "net.drop_path_rate", "Stochastic depth in the encoder.", 0.1)
    batch_size: int = setting(
        POSITIVE,
        "world_batch_size dataset.batch_size algorithm.batch_size",
        "Images per update, over all processes.",
        of=DATA,
        kept=True,
    )
    epochs: int = setting(POSITIVE, "algorithm.num_epochs optimizer.epochs", of=DATA)
    eval_freq: int = setting(POSITIVE, "algorithm.eval_freq", "Epochs between evaluations.", of=DATA)
    num_workers: int = setting(COUNT, "dataset.num_workers", "Processes that read data, per process.", 2)
    amp: bool = setting(
        bool, "amp", "Mixed precision: bfloat16, or float16 where that is missing.", False, flag="--amp/--no-amp"
    )
    seed: int = setting(COUNT, "seed", "Of weights, order and augmentation.", 0)
    start_thresh: float | None = setting(
        float, "dataset.start_threshold", "Curriculum: threshold at the start.", of=CURRICULUM
    )
    curric_warmup: int | None = setting(
        COUNT, "dataset.curriculum_start", "Curriculum: epochs at the start threshold.", of=CURRICULUM
    )
    curric_period: int | None = setting(
        POSITIVE, "dataset.curriculum_period", "Curriculum: epochs between steps of -0.01.", of=CURRICULUM
    )

    @classmethod
    def complete(cls, given: Mapping[str, Any], saved: Mapping[str, Any]) -> "Settings":
        """What was given, then what was saved, then the defaults of data set and backbone.

        Args:
            given: name -> value, without what was not given.
            saved: the same from a `variant.yml`, or {}.

        Raises:
            ValueError: no data set or backbone, or an unknown one.
        """
        chosen = {**saved, **given}
        for name in ("dataset", "backbone"):
            if name not in chosen:
                raise ValueError(f"no {name}: give --{name} or a --config that names one")
        backbone = backbone_settings(chosen["backbone"])
        for name, owner in (("backbone", BACKBONE), ("dataset", DATA)):
            if given.get(name, saved.get(name)) != saved.get(name):
                chosen = {key: value for key, value in chosen.items() if key not in names_of(owner) or key in given}
        if "d_model" in given and "n_heads" not in given:  # heads of 64 channels, as in every ViT
            chosen["n_heads"] = max(1, given["d_model"] // 64)
        data = dataset_defaults(chosen["dataset"])
        if "crop_size" in given:  # a window of the training's size, unless one is given
            data = data | {"window_size": given["crop_size"]}
            chosen = {k: v for k, v in chosen.items() if k not in ("window_size", "window_stride") or k in given}
        settings = {name: backbone[name] for name in names_of(BACKBONE)} | {name: data[name] for name in names_of(DATA)}
        settings |= chosen
        freezes, frozen = ((one.get("freeze_encoder") or one.get("train_only")) for one in (given, saved))
        if freezes and not frozen and "drop_path" not in given:
            settings["drop_path"] = 0.0  # a frozen encoder learns nothing from its noise
        if "window_stride" not in given:
            settings["window_stride"] = short(smaller(settings["window_stride"], settings["window_size"]))
        low, high = settings.get("scale_range", (1.0, 1.0))
        if low > high:
            raise ValueError(f"--scale-range {low:g} {high:g}: give the lower factor first")
        return cls(**settings)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a training crop."""
        height, width = (side // self.patch_size for side in pair(self.crop_size))
        return height, width


SETTINGS: dict[str, Field] = {entry.name: entry for entry in fields(Settings)}


def names_of(owner: str) -> list[str]:
    """Names of the settings of `BACKBONE`, `DATA` or `CURRICULUM`."""
    return [name for name, entry in SETTINGS.items() if entry.metadata.get("of") == owner]


def settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: an option for each of the `Settings`, None where it is not given."""
    for name, entry in reversed(SETTINGS.items()):
        type, flag = entry.metadata["type"], entry.metadata.get("flag", _flag(name))
        if type is not None:
            kind = entry.metadata.get("cls", click.Option)
            more = {"nargs": 2} if "nargs" in entry.metadata else {}
            command = click.option(flag, type=type, default=None, help=_help(entry), cls=kind, **more)(command)
    return command


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _help(entry: Field) -> str:
    text, of, default = entry.metadata["help"], entry.metadata.get("of"), entry.default
    shown = of if of in (BACKBONE, DATA) else f"{default:g}" if isinstance(default, int | float) else default
    shown = entry.metadata.get("shown", shown)
    return text if shown is None or entry.type is bool else f"{text}  [default: {shown}]".strip()


def read_config(ctx: click.Context, param: click.Parameter, value: str | None) -> None:
    """Callback of --config: the entries of a recipe become the defaults of the options."""
    if value is None:
        return
    recipes = config_dir() / "recipes"
    file = next((f for f in (Path(value), recipes / value, recipes / f"{value}.yml") if f.is_file()), None)
    if file is None:
        names = ", ".join(sorted(f.stem for f in recipes.glob("*.yml")))
        raise click.BadParameter(f"no file {value}; recipes in configs/recipes: {names}", ctx, param)
    try:
        recipe = read_yaml(file)
    except ValueError as error:
        raise click.BadParameter(str(error), ctx, param) from error
    known = {option.name: option for option in ctx.command.get_params(ctx)}
    if not isinstance(recipe, dict) or not recipe.keys() <= known.keys():
        unknown = ", ".join(map(str, recipe.keys() - known.keys())) if isinstance(recipe, dict) else "no mapping"
        raise click.BadParameter(f"{file}: {one_line(unknown)}; its keys are the options of this command", ctx, param)
    for name, value in recipe.items():
        try:
            known[name].type_cast_value(ctx, value)
        except Exception as error:  # click's types expect texts, and fail on other values with errors of all kinds
            raise click.BadParameter(f"{file}: {name} is {brief(value)}: {one_line(error)}", ctx, param) from error
    ctx.default_map = recipe


def read_settings(variant: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a `variant.yml` records: name -> value, without those that it lacks."""
    settings = {}
    for name, entry in SETTINGS.items():
        value: Any = variant
        for key in entry.metadata["places"][0]:
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None and entry.metadata["type"] is not None:
            settings[name] = tuple(value) if isinstance(value, list) else value
    return settings


def finetuning_defaults(variant: Mapping[str, Any]) -> dict[str, Any]:
    """What a new run takes over from the one that it starts from: network, data, merging; no schedule."""
    schedule = {SETTINGS[name].metadata["places"][0][-1] for name in names_of(CURRICULUM)}
    data = {key: value for key, value in variant.get("dataset_kwargs", {}).items() if key not in schedule}
    kept = {name: variant[name] for name in ("net_kwargs", "inference_kwargs") if name in variant}
    return kept | {"dataset_kwargs": data}


def backbone_settings(name: str) -> dict[str, Any]:
    """Patch size, width, heads, layers, normalization of a released backbone or of any ViT of timm.

    Raises:
        ValueError: timm does not know the name either.
    """
    released = load_config("backbones")
    if name in released:
        return released[name]
    if not timm.is_model(ALIASES.get(name, name)):
        raise ValueError(f"unknown backbone {name!r}: use a released name ({', '.join(released)}) or a ViT of timm")
    model: Any = timm.create_model(name, pretrained=False, device="meta")
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


@dataclass(frozen=True)
class Plan:
    """All that a training was told.

    Attributes:
        settings: `Settings`.
        method, options: merging as `segm.merging.apply` takes it, all options in force.
        curriculum: of its threshold, or None.
        decoder: `net_kwargs` of the decoder.
        reduction: `net_kwargs` of the learned parts of a method, or None.
    """

    settings: Settings
    method: str
    options: dict[str, Any]
    curriculum: Curriculum | None
    decoder: dict[str, Any]
    reduction: dict[str, Any] | None

    @classmethod
    def make(
        cls, given: Mapping[str, Any], merging: Mapping[str, Any], saved: Mapping[str, Any], resume: bool = False
    ) -> "Plan":
        """Complete and check what was given.

        Args:
            given: name of a setting -> value, None where not given.
            merging: from a `segm.merging.MergingCommand`.
            saved: the `variant.yml` whose settings are the defaults, or {}.
            resume: whether its run goes on.

        Raises:
            ValueError: something is missing, unknown, not allowed, or would make a resumed run another run.
        """
        given = {name: value for name, value in given.items() if value is not None}
        before, net, data = read_settings(saved), saved.get("net_kwargs", {}), saved.get("dataset_kwargs", {})
        if resume:
            _check_resumable(given, before)
        method, options = choose(merging, data)
        if (given | before).get("train_only") is not None:
            options = _learning(method, options)
        if method == PURE or method != data.get("patch_type"):
            before = {name: value for name, value in before.items() if name not in names_of(CURRICULUM)}
        settings = Settings.complete(given, before)
        if settings.cache_features:
            _check_cacheable(settings, method)
        if method != PURE:
            options = check(method, settings.n_layers, settings.grid, **options)
        decoder, curriculum = _decoder(settings, net.get("decoder")), _curriculum(settings, options.get("threshold"))
        return cls(settings, method, options, curriculum, decoder, _reduction(method, options, net.get("reduction")))

    def variant(self, dataset: Any) -> dict[str, Any]:
        """The content of `variant.yml`.

        Args:
            dataset: the training images, with names and colors of their classes: pictures then need no files, and
                another order of classes is noticed.
        """
        variant: dict[str, Any] = {"version": "normal"}
        for name, entry in SETTINGS.items():
            value = getattr(self.settings, name)
            for *sections, key in entry.metadata["places"] if value is not None else ():
                section = variant
                for part in sections:
                    section = section.setdefault(part, {})
                section[key] = [*value] if isinstance(value, tuple) else value
        net, data = variant["net_kwargs"], variant["dataset_kwargs"]
        net |= {"image_size": [*pair(self.settings.crop_size)], "n_cls": dataset.n_cls}
        net["decoder"] = self.decoder | {"n_cls": dataset.n_cls}
        if self.reduction is not None:
            net["reduction"] = self.reduction
        data |= {"split": "train"} | to_variant(self.method, self.options)
        variant["algorithm_kwargs"]["start_epoch"] = 0
        variant["optimizer_kwargs"] |= {"momentum": MOMENTUM, "poly_power": POWER}
        named = enumerate(zip(dataset.classes, dataset.palette.tolist(), strict=True))
        data["classes"] = [{"id": index, "name": name, "color": color} for index, (name, color) in named]
        return variant


def _learning(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a method whose learned parts alone are to be trained."""
    entry = None if method == PURE else find(method)
    if entry is None or entry.modules is None:
        raise ValueError(f"--train-only method: {method} has nothing to learn; name another method with --patch-type")
    return {**options} if entry.enabled_by is None else {entry.enabled_by: True, **options}


def _check_cacheable(settings: Settings, method: str) -> None:
    """Raise a ValueError unless the features of an image are the same in every epoch, and a tensor."""
    if not settings.freeze_encoder or settings.train_only is not None or settings.dropout or settings.drop_path:
        raise ValueError("--cache-features: the encoder has to stay as it is: give --freeze-encoder, without dropout")
    if settings.decoder not in ("linear", "mask_transformer"):
        raise ValueError(f"--cache-features: the decoder {settings.decoder} reads other features than are kept")
    if method != PURE:
        raise ValueError(f"--cache-features: merging with {method} is not kept: train without merging, then --finetune")


def _check_resumable(given: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    kept = [name for name, entry in SETTINGS.items() if entry.metadata.get("kept")]
    changed = [name for name in kept if name in given and given[name] != saved.get(name)]
    if changed:
        flags = ", ".join(map(_flag, changed))
        raise ValueError(f"{flags}: a resumed run keeps these; start a new one with --finetune to change them")


def _decoder(settings: Settings, saved: Mapping[str, Any] | None) -> dict[str, Any]:
    """The decoder's defaults, then what was saved for the same decoder, then what was given."""
    name, known = settings.decoder, load_config("decoders")
    if name not in known:
        raise ValueError(f"unknown decoder {name!r}: choose one of {', '.join(known)}")
    decoder = {"name": name, **known[name]}
    if saved and saved.get("name") == name:
        decoder |= saved
    if "dropout" in decoder and settings.decoder_dropout is not None:
        decoder["dropout"] = settings.decoder_dropout
    if settings.decoder_blocks is not None:
        if "n_blocks" not in decoder:
            raise ValueError(f"--decoder-blocks: the decoder {name} reads the end of the encoder alone")
        decoder["n_blocks"] = settings.decoder_blocks
    return decoder


def _curriculum(settings: Settings, threshold: float | None) -> Curriculum | None:
    start, warmup, period = settings.start_thresh, settings.curric_warmup, settings.curric_period
    if start is None and warmup is None and period is None:
        return None
    if start is None or warmup is None or period is None or threshold is None:
        raise ValueError("a curriculum takes --threshold, --start-thresh, --curric-warmup and --curric-period")
    curriculum = Curriculum(start, threshold, warmup, period)
    if curriculum.epochs > settings.epochs:
        raise ValueError(
            f"the curriculum reaches its threshold and trains with it in {curriculum.epochs} epochs, "
            f"not in {settings.epochs}: give more --epochs or a shorter curriculum"
        )
    return curriculum


def _reduction(method: str, options: Mapping[str, Any], saved: dict[str, Any] | None) -> dict[str, Any] | None:
    """Learned parts, which stay in a model that has some."""
    wanted = learned_parts(method, options)
    if saved and wanted and saved != wanted:
        raise ValueError(f"the run to start from learned with {saved}, not with {wanted}: start from one without")
    return wanted or saved
