"""A trained model with all that it takes to use it.

run = Run.load("runs/graph", threshold=0.9)
labels = run.predict("photo.jpg")
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

import patch
from segm import merging as merges
from segm import sharing
from segm.checkpoint import checkpoint_file
from segm.config import BFLOAT16, EXPORTED, SCALES, Preset, RunConfig, variant_file
from segm.data import DATASETS, SegmentationDataset, class_info, create_dataset, dataset_defaults, normalize
from segm.data.dataset import Photographs
from segm.data.images import Normalization, read_image, resize_keep_ratio, resized_view
from segm.eval.evaluate import MULTISCALE, Samples, Views, both_ways, evaluate
from segm.eval.sliding import Windows, predict_labels
from segm.metrics import BoundaryCount, segmentation_scores
from segm.model.segmenter import Segmenter
from segm.precision import Precision
from segm.sizes import Size, pair, scaled, smaller

Photo = np.ndarray | str | Path
ORIGINAL = SCALES[1]
RESIZE_FACTOR = 4  # longer side of a photograph, at most so many times the shorter, in data sets of others


@dataclass(frozen=True)
class Run:
    """A trained Segmenter and how it was trained.

    Attributes:
        name: in tables and pictures.
        path: checkpoint or run directory.
        model: on `device`, in evaluation mode, patched unless its method is "pure".
        config: its settings, from `variant.yml`.
        device: where it computes.
        precision: with which it predicts.
        im_size: shorter side that images are resized to, pixels; crops and windows are scaled with it. None: as in
            training. Scores stay at the size of the labels.
        scale: of `SCALES`: images as large as in training, or as they are.
        window_size: of the sliding windows, pixels; None: the training's.
    """

    name: str
    path: Path
    model: Segmenter
    config: RunConfig
    device: torch.device
    precision: Precision
    im_size: int | None = None
    scale: str = SCALES[0]
    window_size: Size | None = None

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        name: str | None = None,
        device: torch.device | str | None = None,
        merging: Mapping[str, Any] | None = None,
        amp: bool | None = None,
        im_size: int | None = None,
        scale: str = SCALES[0],
        window_size: Size | None = None,
        preset: str | None = None,
        checkpoint: str | None = None,
        **options: Any,
    ) -> "Run":
        """Load a trained model. What is not given is as the preset says, or else as it was in training.

        Args:
            path: checkpoint or run directory; or "user/name" of a repository on the Hugging Face hub.
            name: None: that of its folder.
            device: None: CUDA if it is there, else the CPU.
            merging: `patch_type` and options of the method, from a command (`segm.merging`).
            amp: whether to predict in mixed precision.
            im_size: shorter side that images are resized to, pixels, in place of the training's.
            scale: "original" for images that are not resized.
            window_size: of the sliding windows, pixels, in place of the training's.
            preset: name of a setting that `segm/tune.py` found; an exported one gives a `segm.exported.ExportedRun`,
                unless `amp` is given.
            checkpoint: of a run directory, "last" or "best"; None: the last, see `segm.checkpoint.checkpoint_file`.
            options: the same as `merging`, by keyword: `patch_type="graph", threshold=0.9, layers=[2]`.

        Raises:
            FileNotFoundError: no checkpoint, or no `variant.yml` beside it; no `tuned.yml` for a preset.
            ValueError: a damaged file, weights that do not fit it, or options that are not allowed.
        """
        from segm.model.factory import load_model  # here, for timm is slow to import

        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        path, given = sharing.find(path, checkpoint), {**(merging or {}), **options}
        name_of_preset = given.pop("preset", preset)
        tuned = None if name_of_preset is None else Preset.read(path, name_of_preset)
        if tuned is not None and tuned.precision in EXPORTED and amp is None:
            from segm.exported import open_run, runtime_of  # which is built on this module

            if given or im_size or window_size:
                raise ValueError(
                    f"preset {name_of_preset!r} is an exported file ({tuned.precision}), its merging and sizes are "
                    "fixed: leave out other options for them, or choose another preset"
                )
            how: dict[str, Any] = {"merging": {}, "scale": scale, **runtime_of(tuned.precision)}
            exported = open_run(tuned.file or checkpoint_file(path), device=device, **how)
            name = name or checkpoint_file(path).resolve().parent.name
            return replace(exported, name=name, path=Path(path))
        model, config = load_model(path, merges.add_parts)
        if tuned is not None:
            config = replace(config, merging=tuned.merging)
            im_size = im_size or (None if scale == ORIGINAL else tuned.im_size)
            amp = tuned.precision == BFLOAT16 if amp is None else amp
        merges.apply(model, *merges.choose(given, config.merging.entries))
        precision = Precision.choose(device, bool(config.optim.amp) if amp is None else amp)
        name = name or checkpoint_file(path).resolve().parent.name
        check_scale(scale, im_size)
        run = cls(name, Path(path), model.to(device), config, device, precision, im_size, scale, window_size)
        return run._with_checked_budget()

    def save_pretrained(self, folder: str | Path, scores: Mapping[str, Any] | None = None) -> None:
        """Write the run into a folder that `Run.load` and the commands take, and a hub: weights in safetensors,
        `variant.yml` with the merging in force, and a model card, which says what checkpoint the weights are.

        Args:
            folder: it is made.
            scores: of `evaluate`, for the card; None: those that the training logged for these weights, if the merging
                in force is the training's; else the card has none. Image size, scale and windows are the training's.

        Raises:
            OSError: it cannot be written there.
            ValueError: the model is an exported one, without weights; or scores at other sizes than the training's.
        """
        sharing.save(self, Path(folder), scores)

    def unpatched(self, name: str | None = None) -> "Run":
        """The same run without merging."""
        return replace(self.with_settings(merges.PURE, {}), name=name or self.name)

    def with_settings(
        self, method: str, options: Mapping[str, Any], im_size: int | None = None, patch_size: int | None = None
    ) -> "Run":
        """This run with other merging, on images or patches of another size; it shares the weights.

        Args:
            method, options: as `segm.merging.apply` takes them.
            im_size: shorter side of the images, pixels; None: as here.
            patch_size: pixels; the patch embedding is resampled; None: as here.
        """
        from segm.model.factory import copy_weights

        if patch_size is None:
            tensors = [*self.model.parameters(), *self.model.buffers()]
            model = copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})
        else:
            model = merges.build_model({**self.config.net_kwargs, "patch_size": patch_size})
            copy_weights(model, self.path)
            model = model.eval().to(self.device)
        if patch.is_patched(model):
            patch.remove(model)
        run = replace(self, model=merges.apply(model, method, options), im_size=im_size or self.im_size)
        return run._with_checked_budget()

    def _with_checked_budget(self) -> "Run":
        """The run itself; raises a ValueError for tokens that images of its size do not have."""
        if self.method != merges.PURE:
            patch.check(self.method, len(self.model.encoder.blocks), self.model.grid(self.crop_size), **self.options)
        return self

    def resolve_merging(self, merging: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """(method, options) that `merging` means for this run: what is given, then what it was trained with."""
        return merges.choose(merging, self.config.merging.entries)

    def same_network(self, other: "Run") -> bool:
        """Return whether both are the same network, merging aside, and are fed the same images."""
        nets = [replace(run.config.net, reduction=None) for run in (self, other)]
        return nets[0] == nets[1] and (self.crop_size, self.normalization) == (other.crop_size, other.normalization)

    @property
    def folder(self) -> Path:
        """The run directory."""
        return checkpoint_file(self.path).parent

    @property
    def method(self) -> str:
        """Name of the method in force, "pure" for none."""
        return merges.method_of(self.model)

    @property
    def options(self) -> dict[str, Any]:
        """The method's options in force."""
        return patch.options(self.model) if patch.is_patched(self.model) else {}

    @property
    def merging(self) -> dict[str, Any]:
        """Method and options in force as `variant.yml` records them."""
        return merges.of_model(self.model)

    @property
    def precision_name(self) -> str:
        """Name of the precision with which it predicts, such as "float32"."""
        return str(self.precision.dtype or torch.float32).removeprefix("torch.")

    @property
    def dataset(self) -> str:
        """Name of the data set that it was trained on."""
        return self._recorded("dataset", self.config.data.dataset)

    @property
    def n_cls(self) -> int:
        """Number of classes."""
        return self.model.n_cls

    @cached_property
    def _class_info(self) -> tuple[tuple[str, ...], np.ndarray]:
        names = self.config.class_names
        if names is None:
            return class_info(self.dataset)  # imports mmseg for data sets other than shapes
        return names, np.array([one["color"] for one in self.config.data.classes], dtype=np.uint8)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, by label."""
        return self._class_info[0]

    @property
    def palette(self) -> np.ndarray:
        """(C, 3), uint8, RGB."""
        return self._class_info[1]

    @property
    def normalization(self) -> str | Normalization:
        """The normalization: a name, or numbers."""
        return self._recorded("normalization", self.config.normalization, "net_kwargs")

    @property
    def bands(self) -> tuple[int, ...] | None:
        """Bands of its images, counted from 1; None: red, green and blue."""
        return self.config.net.bands

    @property
    def image_size(self) -> int:
        """Shorter side of the images at evaluation, pixels."""
        return self._recorded("image_size", self.config.inference.eval_size or self.config.data.im_size)

    @property
    def crop_size(self) -> tuple[int, int]:
        """(height, width) of the training crops, pixels; also of the images that are measured."""
        return scaled(self._recorded("crop_size", self.config.data.crop_size), self.ratio)

    @property
    def ratio(self) -> float:
        """Of the size of images to that of the training's evaluation."""
        return 1.0 if self.im_size is None else self.im_size / self.image_size

    @cached_property
    def windows(self) -> Windows:
        """Sliding windows of the evaluation."""
        return self.choose_windows()

    def choose_windows(self, size: Size | None = None, stride: Size | None = None, batch_size: int = 4) -> Windows:
        """Sliding windows; pixels that are None come from the run, or else from the data set's defaults."""
        size = pair(size or self.window_size or scaled(self._pixels_of("window_size"), self.ratio))
        stride = stride or smaller(scaled(self._pixels_of("window_stride"), self.ratio), size)
        return Windows(size, pair(stride), batch_size)

    def _pixels_of(self, key: str) -> Size:
        """A size of the evaluation: the run's, or else the data set's default."""
        value = getattr(self.config.inference, key)
        if value is None and self.dataset in DATASETS:
            value = dataset_defaults(self.dataset)[key]
        return self._recorded(key, value, "inference_kwargs")

    def _recorded(self, key: str, value: Any, section: str = "dataset_kwargs") -> Any:
        """A setting that the run has to say; raises a ValueError where it does not."""
        if value is None:
            raise ValueError(f"{variant_file(self.path)} has no {key} in its {section}: add it")
        return value

    def preprocess(self, photo: Photo) -> Tensor:
        """A photograph as the model sees it at evaluation: (1, 3, h, w), float32, normalized, ratio kept.

        Args:
            photo: (H, W, 3), uint8, RGB, or a file.

        Raises:
            FileNotFoundError, ValueError: no such file, or no image.
        """
        return self.preprocessing(self._pixels(photo)).unsqueeze(0).to(self.device)

    @cached_property  # as windows: they may read the files of the data sets' defaults
    def preprocessing(self) -> Callable[[np.ndarray], Tensor]:
        """Function from a photograph, (H, W, 3) uint8 RGB, to the image of `preprocess`, (3, h, w), on the CPU.

        It holds no model: workers can take it along.
        """
        if self.scale == ORIGINAL:
            return partial(normalize, normalization=self.normalization)
        factor = dataset_defaults(self.dataset)["resize_factor"] if self.dataset in DATASETS else RESIZE_FACTOR
        (short, _) = scaled(self.image_size, self.ratio)
        return partial(_preprocessed, long=factor * short, short=short, normalization=self.normalization)

    def _pixels(self, photo: Photo) -> np.ndarray:
        return _pixels(photo, self.config.data.value_range, self.bands)

    def preprocess_resized(self, photo: Photo, size: Size | None = None) -> Tensor:
        """A photograph as the measuring commands feed it: (1, 3, H, W), ratio not kept; None: the crop size."""
        return resized_view(self._pixels(photo), size or self.crop_size, self.normalization).to(self.device)

    @overload
    def predict(self, photo: Photo) -> np.ndarray: ...
    @overload
    def predict(self, photo: list[Photo] | tuple[Photo, ...]) -> list[np.ndarray]: ...
    @torch.inference_mode()
    def predict(self, photo: Photo | list[Photo] | tuple[Photo, ...]) -> np.ndarray | list[np.ndarray]:
        """Label map of a photograph from sliding windows, as in the evaluation.

        Args:
            photo: (H, W, 3), uint8, RGB, or a file; or a list of them.

        Returns:
            (H, W), int64; for a list, a list.

        Raises:
            FileNotFoundError, ValueError: no such file, or no image.
        """
        if isinstance(photo, list | tuple):
            return [self.predict(one) for one in photo]
        image = self._pixels(photo)
        return self.predict_preprocessed(self.preprocessing(image), image.shape[:2])

    @torch.inference_mode()
    def predict_preprocessed(self, image: Tensor, size: tuple[int, int], windows: Windows | None = None) -> np.ndarray:
        """Label map, int64 (height, width), of a photograph of this size that `preprocessing` made (3, h, w) of; of
        other windows than the run's, if given."""
        views = both_ways([image], False, self.device)
        with self.precision.autocast():
            return predict_labels(self.model, views, windows or self.windows, size).cpu().numpy()

    def open(self, split: str = "val", name: str | None = None) -> tuple[SegmentationDataset, Windows]:
        """A split to score the run on, and its windows.

        Args:
            name: a data set; None: that of the training. Another one is read at its own image size.

        Raises:
            ValueError: its classes are not those of the run.
        """
        dataset = self._open(name or self.dataset, split)
        if dataset.n_cls != self.n_cls:
            raise ValueError(
                f"{dataset.name} has {dataset.n_cls} classes, the model {self.n_cls}: choose its own data set"
            )
        require_classes(self.config.class_names, dataset, self.name)
        return dataset, self.windows

    def _open(self, name: str, split: str) -> SegmentationDataset:
        size = self.image_size if name == self.dataset else None
        values = self.config.data.value_range if name == self.dataset else None
        how = {"normalization": self.normalization, "value_range": values, "bands": self.bands}
        dataset = create_dataset(name, split, image_size=size, **how)
        dataset.original = self.scale == ORIGINAL
        return dataset

    def views(
        self, source: str | Path | None = None, n_images: int | None = None, *, split: str = "val", **options: Any
    ) -> Views:
        """Images to measure the model on, resized to the crop size; their classes do not matter.

        Args:
            source: a data set; a folder of photographs (a `Path`); None: the data set of the training.
            n_images, options: see `Views`.
        """
        samples: Samples = (
            Photographs(source, self.config.data.value_range, self.bands)
            if isinstance(source, Path)
            else self._open(source or self.dataset, split)
        )
        return Views(samples, self.crop_size, self.normalization, n_images, device=self.device, **options)

    def evaluate(
        self,
        split: str = "val",
        dataset: str | SegmentationDataset | None = None,
        *,
        windows: Windows | None = None,
        multiscale: bool = False,
        n_images: int | None = None,
        boundary: bool = False,
        with_confusion: bool = False,
        workers: int = 0,
        on_image: Callable[[Any, Tensor], None] | None = None,
        progress: bool = False,
    ) -> dict[str, Any]:
        """Score the run, with all processes that there are.

        Args:
            split, dataset: see `open`; or a split that is open already.
            windows: None: the run's.
            multiscale: six scales, each mirrored as well.
            n_images: only so many images, spread over the data set.
            boundary: also `boundary_iou` and `per_class_boundary_iou` (`segm.metrics`).
            with_confusion: also `confusion`, (C, C) pixels, int64 on the CPU; rows are true classes.
            workers, on_image, progress: see `segm.eval.evaluate.evaluate`.

        Returns:
            See `segm.metrics.segmentation_scores`.
        """
        if not isinstance(dataset, SegmentationDataset):
            dataset, _ = self.open(split, dataset)
        count = BoundaryCount(self.n_cls)

        def look(sample: Any, labels: Tensor) -> None:
            if boundary and sample.label is not None:
                count.add(labels.cpu().numpy(), sample.label)
            if on_image is not None:
                on_image(sample, labels)

        with self.precision.autocast():
            confusion = evaluate(
                self.model,
                dataset,
                windows or self.windows,
                ratios=[ratio * self.ratio for ratio in (MULTISCALE if multiscale else (1.0,))],
                flip=multiscale,
                device=self.device,
                n_images=n_images,
                workers=workers,
                on_image=look,
                progress=progress,
            )
        scores = segmentation_scores(confusion) | ({"confusion": confusion} if with_confusion else {})
        return scores | (count.scores(self.device) if boundary else {})


def check_scale(scale: str, im_size: int | None) -> None:
    """Raise a ValueError for a scale that is unknown, or another size together with the original one."""
    if scale not in SCALES:
        raise ValueError(f"scale is {scale!r}: choose one of {', '.join(SCALES)}")
    if scale == ORIGINAL and im_size is not None:
        raise ValueError("images keep their size with --scale original: leave out --im-size")


def require_classes(recorded: tuple[str, ...] | None, dataset: SegmentationDataset, run: str) -> None:
    """Raise a ValueError unless a data set has the classes that a run has learned, in the same order."""
    if recorded is not None and tuple(dataset.classes) != recorded:
        raise ValueError(
            f"the classes of {dataset.name} are {', '.join(dataset.classes)}; those of {run} are "
            f"{', '.join(recorded)}: choose its own data set, or its own class list"
        )


def _preprocessed(image: np.ndarray, long: int, short: int, normalization: str | Normalization) -> Tensor:
    """(H, W, 3), uint8, RGB -> (3, h, w), float32: resized to fit within (long, short) pixels, and normalized."""
    return normalize(resize_keep_ratio(image, long, short), normalization)


def _pixels(photo: Photo, value_range: tuple[float, float] | None, bands: Sequence[int] | None) -> np.ndarray:
    """A photograph as (H, W, 3), uint8, RGB; or its bands, (H, W, C)."""
    if isinstance(photo, str | Path):
        return read_image(photo, value_range=value_range, bands=bands)
    n, kind = (3, "RGB") if bands is None else (len(bands), f"bands {', '.join(map(str, bands))}")
    fits = isinstance(photo, np.ndarray) and photo.dtype == np.uint8 and photo.ndim == 3 and photo.shape[2] == n
    if not (fits and photo.size):
        what = f"{photo.dtype} {photo.shape}" if isinstance(photo, np.ndarray) else type(photo).__name__
        raise ValueError(f"a photograph is an array (H, W, {n}), uint8, {kind}, or a file, not {what}")
    return photo
