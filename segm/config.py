"""`RunConfig`, all settings of a run, each stated once; `variant.yml`, the format of Segmenter; files of `configs/`."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from segm.checkpoint import load_checkpoint, weights_digest
from segm.errors import brief
from segm.sizes import pair
from segm.storage import read_yaml, write_text

if TYPE_CHECKING:
    from segm.data.images import Normalization

logger = logging.getLogger(__name__)

VARIANT, TUNED = "variant.yml", "tuned.yml"
IN_PYTORCH = FLOAT32, BFLOAT16 = ("float32", "bfloat16")
EXPORTED = INT8, OPENVINO_BFLOAT16, OPENVINO_INT8 = ("int8", "openvino-bfloat16", "openvino-int8")
PRECISIONS = (*IN_PYTORCH, *EXPORTED)  # of presets


def config_dir() -> Path:
    """Folder of the YAML files: `configs` beside `segm`."""
    return Path(__file__).parents[1] / "configs"


def load_config(name: str) -> Any:
    """Content of `configs/<name>.yml`; `name` may hold a sub-folder (`recipes/...`).

    Raises:
        ValueError: there is no such file.
    """
    path = config_dir() / f"{name}.yml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yml"))) or "none"
        raise ValueError(f"no configuration {name!r}: {path} does not exist (there: {known})")
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Kind:
    """The values that a setting takes.

    Attributes:
        words: what a value is, for a message.
        fits: whether a value of a file is one.
        type: how the command line reads one; None: it has no flag.
        many: how many values the flag takes; "sides": one, or height and width; "several": one or more.
    """

    words: str
    fits: Callable[[Any], bool]
    type: click.ParamType | None = None
    many: int | str = 1


def _whole(low: int, high: int) -> Kind:
    words = f"a whole number from {low} to {high}"
    return Kind(words, lambda value: type(value) is int and low <= value <= high, click.IntRange(low, high))


def _number(low: float, high: float = 1e15, above: bool = False) -> Kind:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and (low < value if above else low <= value) and value <= high

    words = f"a number {'above' if above else 'from'} {low:g}" + (f" to {high:g}" if high < 1e15 else "")
    return Kind(words, fits, click.FloatRange(low, high if high < 1e15 else None, min_open=above))


def _name(*allowed: str) -> Kind:
    """A text; only the command line checks that it is allowed: a file may come from a later version."""
    type = click.Choice(allowed) if allowed else click.STRING
    return Kind("a text", lambda value: isinstance(value, str) and bool(value.strip()), type)


def _has_classes(value: Any) -> bool:
    """Return whether these are entries of `classes`: a name, and a color of three numbers from 0 to 255."""
    return isinstance(value, list) and all(
        isinstance(entry, dict)
        and isinstance(entry.get("name"), str)
        and isinstance(entry.get("color"), list)
        and len(entry["color"]) == 3
        and all(type(part) is int and 0 <= part <= 255 for part in entry["color"])
        for entry in value
    )


def _has_weights(value: Any) -> bool:
    """Return whether these are weights of classes, or a word that says where they come from."""
    return isinstance(value, str) or (isinstance(value, list) and all(map(RATE.fits, value)))


def _has_bands(value: Any) -> bool:
    """Return whether these are numbers of bands."""
    return isinstance(value, list | tuple) and bool(value) and all(map(SIZE.fits, value))


def _has_inventory(value: Any) -> bool:
    """Return whether this is split -> what `segm.data.inventory` records of it."""
    return isinstance(value, dict) and all(isinstance(name, str) and _has_split(found) for name, found in value.items())


def _has_split(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    pixels, notes = found.get("pixels"), found.get("notes")
    numbers = [found.get(key) for key in ("images", "masks_counted", "ignored_pixels")]
    sides = [found.get(key) for key in ("smallest", "largest")]
    return (
        all(type(number) is int and number >= 0 for number in numbers)
        and all(isinstance(side, list) and len(side) == 2 and all(map(SIZE.fits, side)) for side in sides)
        and isinstance(pixels, dict)
        and all(isinstance(name, str) and type(count) is int and count >= 0 for name, count in pixels.items())
        and isinstance(notes, list)
        and all(isinstance(note, str) for note in notes)
    )


def _several(kind: Kind, words: str, count: int, alone: bool = False) -> Kind:
    """So many values of a kind; alone: or a single one, which is a side of a square."""

    def fits(value: Any) -> bool:
        values = value if isinstance(value, list | tuple) or not alone else [value] * count
        return isinstance(values, list | tuple) and len(values) == count and all(map(kind.fits, values))

    return Kind(words, fits, kind.type, "sides" if alone else count)


SIZE, COUNT = _whole(1, 1 << 16), _whole(0, 1 << 31)  # pixels, channels, images; anything counted from 0
UPDATES = _whole(1, 1 << 31)
LAYERS, CLASSES = _whole(1, 512), _whole(1, 65535)
LOSSES = ("cross_entropy", "focal", "dice")
SHARE, RATE, THRESHOLD = _number(0, 1), _number(0), _number(-1, 1)
FLAG = Kind("true or false", lambda value: isinstance(value, bool), click.BOOL)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
FACTOR = _number(0, above=True)
SIDES = _several(SIZE, "a whole number from 1, or two of them", 2, alone=True)
BANDS = Kind("a list of whole numbers from 1", _has_bands, click.IntRange(1, 1 << 16), "several")
RANGE = _several(FACTOR, "two numbers above 0", 2)
VALUES = _several(_number(-1e15), "two numbers, the lowest and the highest", 2)
MEAN, STD = _several(SHARE, "three numbers from 0 to 1", 3), _several(FACTOR, "three numbers above 0", 3)
WEIGHTS = Kind("auto, a file, or a list of numbers", _has_weights, click.STRING)
CLASS_LIST = Kind("a list of {name, color: [r, g, b]}", _has_classes)
INVENTORY = Kind("what a training records of its data", _has_inventory)

DATASETS: tuple[str, ...] = tuple(load_config("datasets"))
DECODERS: tuple[str, ...] = tuple(load_config("decoders"))
OPTIMIZERS = ("sgd", "adamw")
SCHEDULERS = ("polynomial", "polynomial_epoch", "cosine")
MOMENTUM, POWER = 0.9, 0.9  # of SGD; of the polynomial schedules
METHOD = "method"  # what may be trained alone
SCALES = ("training", "original")  # of images: resized as in training, or as they are
BACKBONE, DATA = "the backbone's", "the data set's"
CURRICULUM = ("start_thresh", "curric_warmup", "curric_period")


def setting(kind: Kind, keys: str, help: str = "", default: Any = None, **more: Any) -> Any:
    """A field of a part of `RunConfig`.

    Args:
        kind: the values that it takes.
        keys: where it stands in `variant.yml`, as in "net.d_model" for d_model in net_kwargs; all are written, and
            the first that is there is read.
        help: a sentence for --help, with its unit; "": it has no flag.
        default: its value in a new run where nothing else is known; None: see `default_from`, or there is none.
        more: `default_from`: whose default it has, `BACKBONE` or `DATA`;
            `default_text`: the default in --help, where that is not the default itself;
            `frozen_on_resume`: whether a resumed run has to keep it: its weights or the optimizer belong to it;
            `flag`: other than its name.
    """
    paths = [key.replace(".", "_kwargs.", 1).rpartition(".")[::2] for key in keys.split()]  # (section, key)
    return field(default=None, metadata={"kind": kind, "help": help, "keys": paths, "default": default, **more})


# fmt: off
@dataclass(frozen=True)
class Net:
    """The network."""

    backbone: str = setting(_name(), "net.backbone", "Released name, or the name of any plain ViT of timm.",
        frozen_on_resume=True, default_text="that of the run to start from")
    decoder: str = setting(_name(*DECODERS), "net.decoder.name", "Decoder that gives every patch its logits.",
        "mask_transformer", frozen_on_resume=True)
    patch_size: int = setting(SIZE, "net.patch_size", "Side of a patch, pixels.", default_from=BACKBONE,
        frozen_on_resume=True)
    d_model: int = setting(SIZE, "net.d_model", "Width of the encoder, channels.", default_from=BACKBONE,
        frozen_on_resume=True)
    n_heads: int = setting(SIZE, "net.n_heads", "Attention heads per block.", default_from=BACKBONE,
        frozen_on_resume=True, default_text=f"{BACKBONE}, or width / 64")
    n_layers: int = setting(LAYERS, "net.n_layers", "Blocks of the encoder.", default_from=BACKBONE,
        frozen_on_resume=True)
    distilled: bool = setting(FLAG, "net.distilled", default_from=BACKBONE)
    normalization: str = setting(_name("vit", "deit", "clip", "unit"), "net.normalization dataset.normalization",
        "Mean and std that normalize pixels: those of AugReg, ImageNet or CLIP, or 0 and 1.", default_from=BACKBONE)
    mean: tuple[float, float, float] | None = setting(MEAN, "net.mean",
        "Mean of red, green and blue, pixels from 0 to 1, instead of that of --normalization.", default_from=BACKBONE)
    std: tuple[float, float, float] | None = setting(STD, "net.std",
        "Standard deviation of red, green and blue, likewise.", default_from=BACKBONE)
    bands: tuple[int, ...] | None = setting(BANDS, "net.bands dataset.bands",
        "Bands of the images of folder, counted from 1, that are the channels of the network.", frozen_on_resume=True,
        default_text="red, green and blue")
    dropout: float = setting(SHARE, "net.dropout", "Dropout in the encoder, share of the values.", 0.0)
    drop_path: float = setting(SHARE, "net.drop_path_rate", "Stochastic depth in the encoder, share of the residuals.",
        0.1, default_text="0.1; 0 with a frozen encoder")
    decoder_dropout: float | None = setting(SHARE, "net.decoder.dropout",
        "Dropout in the decoder, share of the values.", default_text="0.1")
    decoder_blocks: int | None = setting(LAYERS, "net.decoder.n_blocks",
        "Last blocks of the encoder that linear_bn reads or queries of eomt join.", default_text="1; 3")
    decoder_layers: int | None = setting(LAYERS, "net.decoder.n_layers")
    decoder_drop_path: float | None = setting(SHARE, "net.decoder.drop_path_rate")
    n_cls: int = setting(CLASSES, "net.n_cls net.decoder.n_cls")
    image_size: int | tuple[int, int] = setting(SIDES, "net.image_size")
    reduction: Mapping[str, Any] | None = setting(MAPPING, "net.reduction")
    decoder_kwargs: Mapping[str, Any] = field(default_factory=dict)  # of the decoder, which no other field stands for


@dataclass(frozen=True)
class Data:
    """The data set and how training reads it."""

    dataset: str = setting(_name(*DATASETS), "dataset.dataset", "Data set; all but shapes are read from $DATASET.",
        frozen_on_resume=True, default_text="that of the run to start from")
    im_size: int = setting(SIZE, "dataset.image_size", "Shorter side of the images, pixels.", default_from=DATA)
    crop_size: int | tuple[int, int] = setting(SIDES, "dataset.crop_size", "Training crop, pixels.", default_from=DATA,
        frozen_on_resume=True)
    scale_range: tuple[float, float] = setting(RANGE, "dataset.scale_range",
        "Training images are resized by a random factor in this range.", (0.5, 2.0), default_text="0.5 2.0")
    value_range: tuple[float, float] | None = setting(VALUES, "dataset.value_range",
        "Lowest and highest value of images that are not stored in 8 bits.", frozen_on_resume=True,
        default_text="judged by a few training images")
    flip: bool = setting(FLAG, "dataset.flip",
        "Mirror half of the training images; not if classes depend on left and right.", True, flag="--flip/--no-flip")
    num_workers: int | None = setting(COUNT, "dataset.num_workers",
        "Processes that read images, per training process.", default_text="cores / processes, at most 8")
    classes: Sequence[Mapping[str, Any]] | None = setting(CLASS_LIST, "dataset.classes")
    inventory: Mapping[str, Any] | None = setting(INVENTORY, "dataset.inventory")


@dataclass(frozen=True)
class Optim:
    """The optimizer, and what it moves."""

    optimizer: str = setting(_name(*OPTIMIZERS), "optimizer.opt", f"Optimizer; sgd has momentum {MOMENTUM}.", "sgd",
        frozen_on_resume=True)
    learning_rate: float = setting(RATE, "optimizer.lr", "Learning rate at the start of the schedule.",
        default_from=DATA)
    weight_decay: float = setting(RATE, "optimizer.weight_decay",
        "Weight decay, of all but biases, norms and embeddings.", 0.0, frozen_on_resume=True)
    encoder_lr_mult: float = setting(FACTOR, "optimizer.encoder_lr_mult",
        "Learning rate of the encoder, × learning rate.", 1.0, frozen_on_resume=True)
    layer_decay: float = setting(_number(0, 1, above=True), "optimizer.layer_decay",
        "Learning rate of each layer of the encoder, × that of the next.", 1.0, frozen_on_resume=True)
    loss: str = setting(_name(), "algorithm.loss",
        f"Loss of all pixels: one of {', '.join(LOSSES)}, or several separated by commas, which are added.",
        "cross_entropy")
    class_weights: str | Sequence[float] | None = setting(WEIGHTS, "algorithm.class_weights",
        "Weights of the classes in cross-entropy and focal loss: auto, from the counts of their pixels, or a YAML file "
        "with a list or with name: number.", default_text="1 each")
    clip_grad: float | None = setting(_number(0, above=True), "optimizer.clip_grad",
        "Clip gradients to this norm.", default_text="none")
    ema: float = setting(_number(0, 0.999999), "optimizer.ema",
        "Evaluate and save averaged weights: the share of the old average in each update, such as 0.9999.", 0.0,
        frozen_on_resume=True, default_text="0, no average")
    freeze_encoder: bool = setting(FLAG, "optimizer.freeze_encoder", "Train only the decoder.", False,
        flag="--freeze-encoder/--no-freeze-encoder", frozen_on_resume=True)
    train_only: str | None = setting(_name(METHOD), "optimizer.train_only",
        "Train only the learned parts of the merging method.", frozen_on_resume=True, default_text="train everything")
    amp: bool = setting(FLAG, "amp", "Train in mixed precision: bfloat16, or float16 where that is missing.", False,
        flag="--amp/--no-amp")


@dataclass(frozen=True)
class Schedule:
    """The course of a training: learning rate, epochs, evaluations, curriculum."""

    scheduler: str = setting(_name(*SCHEDULERS), "optimizer.sched",
        "Decay of the learning rate: per iteration, polynomial_epoch per epoch.", "polynomial")
    minlearning_rate: float = setting(RATE, "optimizer.min_lr", "Learning rate at the end of the schedule.", 1e-5,
        default_text="1e-05, or the learning rate where that is lower")
    warmup_epochs: int = setting(COUNT, "optimizer.warmup_epochs", "Epochs in which the learning rate rises linearly.",
        0)
    start_factor: float = setting(RATE, "optimizer.start_factor",
        "Learning rate at the start of the warm-up, × learning rate.", 1.0)
    batch_size: int = setting(SIZE, "world_batch_size dataset.batch_size algorithm.batch_size",
        "Images per update, over all processes.", default_from=DATA, frozen_on_resume=True)
    accumulate: int = setting(SIZE, "algorithm.accumulate",
        "Parts of a batch that go through the network one by one before an update, to save memory.", 1)
    epochs: int = setting(SIZE, "algorithm.num_epochs optimizer.epochs", "Epochs of the training.", default_from=DATA)
    epochs_before: int = setting(COUNT, "algorithm.epochs_before", default=0)  # of the trainings it was fine-tuned from
    eval_freq: int = setting(SIZE, "algorithm.eval_freq", "Epochs between two evaluations.", default_from=DATA)
    updates: int | None = setting(UPDATES, "algorithm.num_updates",
        "Updates of the training, instead of epochs; other options in epochs then count evaluations.",
        default_text="--epochs")
    eval_every: int | None = setting(UPDATES, "algorithm.eval_every",
        "Updates between two evaluations, of which --updates is a multiple.", default_text="a tenth of --updates",
        frozen_on_resume=True)
    patience: int | None = setting(SIZE, "algorithm.patience",
        "Stop after so many evaluations without a better mIoU.", default_text="never")
    seed: int = setting(COUNT, "seed", "Seed of weights, order and augmentation.", 0)
    cache_features: int = setting(COUNT, "algorithm.cache_features",
        "With --freeze-encoder, augmented versions of each image whose features are computed once; 0: no cache.", 0,
        frozen_on_resume=True)
    start_thresh: float | None = setting(THRESHOLD, "dataset.start_threshold",
        "Threshold that a curriculum starts at.", default_text="no curriculum")
    curric_warmup: int | None = setting(COUNT, "dataset.curriculum_start",
        "Epochs of a curriculum at its start threshold.", default_text="no curriculum")
    curric_period: int | None = setting(SIZE, "dataset.curriculum_period",
        "Epochs of a curriculum between steps of -0.01.", default_text="no curriculum")

    def course(self, epochs: int) -> str:
        """So many epochs in words, or the updates that they stand for."""
        return f"{epochs} epochs" if self.eval_every is None else f"{epochs * self.eval_every} updates"


@dataclass(frozen=True)
class Inference:
    """The sliding windows of the evaluation."""

    eval_size: int = setting(SIZE, "inference.im_size")
    window_size: int | tuple[int, int] = setting(SIDES, "inference.window_size", "Sliding window, pixels.",
        default_from=DATA, default_text=f"{DATA}, or the crop size")
    window_stride: int | tuple[int, int] = setting(SIDES, "inference.window_stride",
        "Stride of the sliding window, pixels.", default_from=DATA)


@dataclass(frozen=True)
class Merging:
    """The merging method of a run.

    Attributes:
        method: its name; None: the run does not say.
        recorded: its options as `dataset_kwargs` hold them; `segm.merging` reads them by the method's own table.
    """

    method: str | None = setting(_name(), "dataset.patch_type")
    recorded: Mapping[str, Any] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, Any]:
        """Method and options as `dataset_kwargs` hold them."""
        return {"patch_type": self.method, **self.recorded}
# fmt: on


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run. `segm.resolve.resolve` completes and checks what a user gives.

    In a run that was read, None stands for what its `variant.yml` does not say.
    """

    net: Net = field(default_factory=Net)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    schedule: Schedule = field(default_factory=Schedule)
    inference: Inference = field(default_factory=Inference)
    merging: Merging = field(default_factory=Merging)

    @property
    def values(self) -> dict[str, Any]:
        """Name -> value of every setting."""
        return {name: getattr(getattr(self, part), name) for name, (part, _) in SETTINGS.items()}

    def with_values(self, **values: Any) -> "RunConfig":
        """The same with other values of some settings, by name."""
        own = {part: {name: value for name, value in values.items() if SETTINGS[name][0] == part} for part in PARTS}
        return replace(self, **{part: replace(getattr(self, part), **given) for part, given in own.items() if given})

    def for_finetuning(self) -> "RunConfig":
        """The part that a new run takes over: network, data, windows, merging; no optimizer, no schedule.

        Epochs that were trained are counted on.
        """
        epochs = (self.schedule.epochs_before or 0) + (self.schedule.epochs or 0)
        return replace(self, optim=Optim(), schedule=Schedule(epochs_before=epochs))

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a training crop, those at the right and lower border padded."""
        height, width = (-(-side // self.net.patch_size) for side in pair(self.data.crop_size))
        return height, width

    @property
    def normalization(self) -> "str | Normalization | None":
        """Mean and standard deviation of pixels, by name or as numbers; None: the run does not say."""
        from segm.data.images import Normalization, get_normalization  # whose package reads the data sets' names here

        name, mean, std = self.net.normalization, self.net.mean, self.net.std
        if mean is None and std is None:
            return name
        known = get_normalization(name or "vit")
        return Normalization(mean or known.mean, std or known.std)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes, by label; None: the run does not say."""
        return None if self.data.classes is None else tuple(one["name"] for one in self.data.classes)

    @property
    def net_kwargs(self) -> dict[str, Any]:
        """The network as `segm.model.factory.create_segmenter` takes it."""
        return self.to_variant()["net_kwargs"]

    @classmethod
    def read(cls, path: str | Path) -> "RunConfig":
        """Read the `variant.yml` (or `variant.yaml`) beside a checkpoint or in a run directory.

        Raises:
            FileNotFoundError: neither is there.
            ValueError: no YAML of a bounded size, a tag other than `!!python/tuple`, no `net_kwargs` in it, or a value
                of another kind than its setting's.
        """
        file = variant_file(path)
        variant = read_yaml(file, _VariantLoader)
        try:
            return cls.from_variant(variant)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from error

    @classmethod
    def from_variant(cls, variant: Any) -> "RunConfig":
        """Read the content of a `variant.yml`.

        Raises:
            ValueError: as `read`.
        """
        if not isinstance(variant, dict) or not isinstance(variant.get("net_kwargs"), dict):
            raise ValueError("it has no net_kwargs")
        left = {section: dict(_section(variant, section)) for section in SECTIONS}
        values = {}
        for name, (_, entry) in SETTINGS.items():
            places = [left[section].pop(key, None) for section, key in entry.metadata["keys"]]
            value = next((one for one in places if one is not None), None)
            if value is not None:
                values[name] = _checked(entry, value)
        constants = CONSTANTS["dataset_kwargs"]
        recorded = {key: value for key, value in left["dataset_kwargs"].items() if key not in constants}
        found = cls(Net(decoder_kwargs=left["net_kwargs.decoder"]), merging=Merging(recorded=recorded))
        return found.with_values(**values)

    def to_variant(self) -> dict[str, Any]:
        """The content of `variant.yml`; settings that are None are left out."""
        variant: dict[str, Any] = {}
        flat: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
        flat["net_kwargs.decoder"] |= self.net.decoder_kwargs
        flat["dataset_kwargs"] |= self.merging.recorded
        for name, value in self.values.items():
            for section, key in SETTINGS[name][1].metadata["keys"] if value is not None else ():
                flat[section][key] = [*value] if isinstance(value, tuple) else value
        for section, content in flat.items():
            place = variant
            for name in filter(None, section.split(".")):
                place = place.setdefault(name, {})
            place |= {**CONSTANTS.get(section, {}), **content} if content else {}
        return variant

    def write(self, folder: str | Path) -> None:
        """Write `variant.yml` into a run directory, in plain YAML."""
        write_text(Path(folder) / VARIANT, yaml.safe_dump(self.to_variant(), sort_keys=True))


PARTS = {"net": Net, "data": Data, "optim": Optim, "schedule": Schedule, "inference": Inference, "merging": Merging}
# name -> (part of RunConfig, field)
SETTINGS: dict[str, tuple[str, Field]] = {
    entry.name: (part, entry) for part, kind in PARTS.items() for entry in fields(kind) if entry.metadata
}
SECTIONS = ["", "net_kwargs", "net_kwargs.decoder", "dataset_kwargs", "inference_kwargs"]
SECTIONS += ["optimizer_kwargs", "algorithm_kwargs"]
CONSTANTS: dict[str, dict[str, Any]] = {
    "": {"version": "normal"},
    "dataset_kwargs": {"split": "train"},
    "algorithm_kwargs": {"start_epoch": 0},
    "optimizer_kwargs": {"momentum": MOMENTUM, "poly_power": POWER},
}


class _VariantLoader(yaml.SafeLoader):
    """PyYAML's safe loader, which also knows tuples: released files hold `!!python/tuple`, and no other tag."""


_VariantLoader.add_constructor(
    "tag:yaml.org,2002:python/tuple", lambda loader, node: tuple(loader.construct_sequence(node))
)


def variant_file(path: str | Path) -> Path:
    """The `variant.yml` (or `variant.yaml`) beside a checkpoint or in a run directory.

    Raises:
        FileNotFoundError: neither is there.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    for name in (VARIANT, "variant.yaml"):
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"no {VARIANT} in {folder}: it belongs beside the checkpoint")


@dataclass(frozen=True)
class Preset:
    """A setting of a run that `tune.py` found.

    Attributes:
        merging: method and options as `dataset_kwargs` hold them.
        im_size: shorter side of the images, pixels.
        precision: of `PRECISIONS`.
        file: exported model in the run directory, of those in `EXPORTED` alone.
    """

    merging: Merging
    im_size: int
    precision: str
    file: Path | None = None

    @classmethod
    def read(cls, path: str | Path, name: str) -> "Preset":
        """Read one from the `tuned.yml` of a run directory, or of that of a checkpoint.

        One that was found for other weights is named in a warning.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or has no setting of this name; or that is a file exported from other weights.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        content = read_tuned(folder)
        if content is None:
            raise FileNotFoundError(f"no {TUNED} in {folder}: g2tm tune {path} DATASET makes one")
        presets = content["presets"]
        if name not in presets:
            raise ValueError(f"no preset {name!r}: {folder / TUNED}, made by g2tm tune, has {', '.join(presets)}")
        try:
            one = dict(presets[name])
            entries, file = dict(one["merging"]), one.get("file")
            merging = Merging(entries.pop("patch_type"), entries)
            preset = cls(merging, int(one["im_size"]), str(one["precision"]), file and folder / file)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / TUNED} is damaged: make it again with g2tm tune") from error
        recorded = content.get("weights")
        if recorded is not None and recorded != weights_digest(load_checkpoint(path)["model"]):
            stale = f"{folder / TUNED} was made for other weights than those of {path}: run g2tm tune again"
            if preset.precision in EXPORTED:
                raise ValueError(f"preset {name!r} is an exported file ({preset.precision}), and {stale}")
            logger.warning("preset %r: %s", name, stale)
        return preset


def read_tuned(folder: Path) -> Mapping[str, Any] | None:
    """The content of the `tuned.yml` of a run directory, which holds `presets`; None where there is none.

    Raises:
        ValueError: it is damaged.
    """
    file = folder / TUNED
    if not file.is_file():
        return None
    content = read_yaml(file)
    if not isinstance(content, dict) or not isinstance(content.get("presets"), dict):
        raise ValueError(f"{file} is damaged: make it again with g2tm tune")
    return content


def recorded_grid(path: str | Path, patch_sides: Sequence[int]) -> tuple[int, int] | None:
    """Patches per side (gh, gw) that a run was trained with: their number alone does not tell 18×32 from 24×24.

    Args:
        path: a run directory, or a file in it.
        patch_sides: height and width of a patch, pixels; () if they are not known.

    Returns:
        The grid, or None where no `variant.yml` says it.

    Raises:
        ValueError: as `RunConfig.read`.
    """
    try:
        size = RunConfig.read(path).net.image_size
    except FileNotFoundError:
        return None
    if size is None or len(patch_sides) != 2:
        return None
    height, width = pair(size)
    return height // patch_sides[0], width // patch_sides[1]


def _section(variant: Mapping[str, Any], section: str) -> Mapping[str, Any]:
    """A section of a `variant.yml`, {} where it is not there; raises a ValueError where it is no mapping."""
    values: Any = variant
    for name in filter(None, section.split(".")):
        values = values.get(name)
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise ValueError(f"{section} is {brief(values)}, it should be a mapping")
    return values


def _checked(entry: Field, value: Any) -> Any:
    """A value of a file as a setting takes it: pairs are tuples."""
    kind, (section, key) = entry.metadata["kind"], entry.metadata["keys"][0]
    if not kind.fits(value):
        where = f"{key} in {section}" if section else key
        raise ValueError(f"{where} is {brief(value)}, it should be {kind.words}")
    return tuple(value) if kind.many != 1 and isinstance(value, list) else value
