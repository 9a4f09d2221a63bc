"""`Trainer`: a training with one counter, `step`, that its order, learning rate, curriculum and annealing follow."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import patch
from segm import merging, parallel
from segm.checkpoint import BEST, LAST, load_checkpoint, save_checkpoint
from segm.config import WEIGHTS, RunConfig, Schedule
from segm.data import SegmentationDataset, create_dataset, fingerprint
from segm.data.dataset import ignore_label, mix_seeds
from segm.data.loader import create_loader
from segm.errors import brief, one_line
from segm.eval.evaluate import evaluate
from segm.eval.sliding import Windows
from segm.features import FOLDER, CachedFeatures, DecoderOnly
from segm.losses import Objective, balanced_weights
from segm.merging import PURE
from segm.metrics import segmentation_scores
from segm.model.segmenter import Segmenter, compile_blocks
from segm.optim import create_optimizer, create_scheduler, layer_scale
from segm.parallel import Interruption, SignalError
from segm.precision import Precision, fast_float32, peak_memory, sum_dtype
from segm.resolve import curriculum
from segm.run import require_classes
from segm.runlog import RunLog, run_lock
from segm.storage import read_yaml

logger = logging.getLogger(__name__)
BYTES_PER_PIXEL = 3 * 4 + 8  # of an image in float32 and its labels in int64
READ_EVERY = 10  # steps between readings of the loss: each one waits for the device
N_MASKS, N_HEADERS = 200, 5000  # that are inspected in every split before a training: a few seconds
SCORES = ("pixel_accuracy", "mean_accuracy", "mean_iou")


@dataclass
class Meter:
    """Measurements of an epoch, or of what was left of it after an interruption."""

    begin: float = field(default_factory=time.perf_counter)
    wait: float = 0.0  # seconds for batches
    n_images: int = 0
    n_skipped: int = 0
    method_losses: list[Tensor] = field(default_factory=list)
    unread: list[Tensor] = field(default_factory=list)  # losses since the device was last waited for


class Trainer:
    """Trains a Segmenter, and writes checkpoints, `variant.yml`, `log.txt` and TensorBoard events.

        Trainer(resolve({"dataset": "shapes", "backbone": "vit_tiny_patch16_384"}), "runs/plain").fit()

    On the CPU, a training that is interrupted anywhere and resumed ends with the weights of one that is not, to the
    bit: all that an update depends on comes from the seed and `step`.

    Args:
        config: from `segm.resolve.resolve`.
        log_dir: the run directory; it is made.
        device: None: CUDA if it is there, else the CPU.
        weights: first weights of the encoder: timm's (True), those of a file, or random ones (False).
        finetune: checkpoint or run that all weights come from.
        resume: continue from the last checkpoint in `log_dir`.
        save_every: minutes between checkpoints inside an epoch; None: only after epochs.
        skip_bad_images: leave out images that cannot be read, and count them.
        feature_folder: where cached features are kept; None: in `log_dir`, until the training ends.
        compile: compile attention and MLPs.
        progress: show bars.
        say: called with every line about the training.

    Attributes:
        step: updates that are done.
        best: highest mIoU so far, percent; -1: none.
        n_worse: evaluations since then.
        averaged: the model with averaged weights; None: they are not averaged.

    Raises:
        FileNotFoundError, ConnectionError, ValueError: data or weights that are missing, damaged or do not fit.
    """

    def __init__(
        self,
        config: RunConfig,
        log_dir: str | Path,
        *,
        device: torch.device | str | None = None,
        weights: bool | str | Path = True,
        finetune: str | Path | None = None,
        resume: bool = False,
        save_every: float | None = 15.0,
        skip_bad_images: bool = False,
        feature_folder: Path | None = None,
        compile: bool = False,
        progress: bool = False,
        say: Callable[[str], Any] = logger.info,
    ) -> None:
        self.log_dir, self.resume, self.save_every = Path(log_dir), resume, save_every
        self.progress, self.say = progress and parallel.is_main(), say
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.train_set, self.val_set = open_datasets(config, skip_bad_images)
        self.config = self._with_data(config)
        self.method, options = merging.read_variant(self.config.merging.entries)
        self.curriculum = curriculum(self.config)
        self.windows = Windows.of(config.inference.window_size, config.inference.window_stride)
        torch.manual_seed(config.schedule.seed)
        self.model = merging.first_model(self.config, False if resume else weights, None if resume else finetune)
        merging.apply(self.model, self.method, options)
        self.averaged = self._average()
        self._freeze()
        if compile:
            compile_blocks(chain(self.model.encoder.blocks, self.model.decoder.blocks))
        parallel.synchronize_batch_norm(self.model, self.device).to(self.device)
        self.precision = Precision.choose(self.device, bool(config.optim.amp))
        given = config.data.num_workers
        n_pixels = math.prod(self.train_set.crop_size) * config.schedule.batch_size // parallel.world_size()
        asked = parallel.default_workers() if given is None else given
        self.workers = parallel.fitting_workers(asked, n_pixels * BYTES_PER_PIXEL)
        self.features = self._cached_features(feature_folder)
        self._keeps_features = feature_folder is not None
        self.loader = self._create_loader()
        self.optimizer = self._create_optimizer()
        self.scheduler = create_scheduler(
            self.optimizer,
            config.schedule.scheduler,
            epochs=config.schedule.epochs,
            updates_per_epoch=len(self.loader),
            learning_rate=config.optim.learning_rate,
            min_lr=config.schedule.minlearning_rate,
            warmup_epochs=config.schedule.warmup_epochs,
            start_factor=config.schedule.start_factor,
        )
        self.step, self.best, self.n_worse = 0, -1.0, 0
        self._is_open = False  # whether the epoch has updates whose end is not recorded
        self.losses = torch.zeros(2, dtype=sum_dtype(self.device), device=self.device)  # of this epoch: sum, number
        self.meter = Meter()
        self.objective: nn.Module = self._objective()
        self.log: RunLog | None = None
        self._interruption, self._requests = Interruption(), parallel.Requests()
        self._saved = time.monotonic()

    # --- What is built

    def _with_data(self, config: RunConfig) -> RunConfig:
        """The configuration with the classes of the data and what an inspection finds; pictures then need no files."""
        size, n_processes, n_parts = config.schedule.batch_size, parallel.world_size(), config.schedule.accumulate
        if size % (n_processes * n_parts):
            parts = f", times {n_parts} parts" if n_parts > 1 else ""
            raise ValueError(f"--batch-size {size}: give a multiple of the {n_processes} processes{parts}")
        if self.resume:
            require_classes(config.class_names, self.train_set, str(self.log_dir))
        named = zip(self.train_set.classes, self.train_set.palette.tolist(), strict=True)
        classes = [{"id": index, "name": name, "color": color} for index, (name, color) in enumerate(named)]
        inventory = self._inspect() or config.data.inventory
        weights = parallel.from_main(class_weights(config.optim.class_weights, self.train_set.classes, inventory))
        found = {"n_cls": self.train_set.n_cls, "classes": classes, "inventory": inventory, "class_weights": weights}
        return config.with_values(value_range=self.train_set.value_range, **found)

    def _inspect(self) -> dict[str, Any]:
        """Inspect the files in the main process; split -> what it holds."""
        if self.train_set.name == "shapes" or not parallel.is_main():
            return {}
        from segm.data.inventory import copies, inspect_dataset  # imports mmseg, which `shapes` does without

        found = {}
        for dataset in (self.train_set, self.val_set):
            inventory = inspect_dataset(dataset, n_masks=N_MASKS, n_headers=N_HEADERS, skip_bad=dataset.skip_bad)
            if inventory is not None:
                self.say("\n".join(inventory.lines()))
                found[dataset.split] = inventory.record()
        if warning := copies(self.train_set, self.val_set, N_MASKS):
            self.say(f"  warning: {warning}")
        return found

    def _average(self) -> AveragedModel | None:
        decay = self.config.optim.ema
        if not decay:
            return None
        return AveragedModel(self.model, self.device, multi_avg_fn=get_ema_multi_avg_fn(decay))

    @property
    def result(self) -> Segmenter:
        """The model that is evaluated and saved: with averaged weights, where they are averaged."""
        return self.model if self.averaged is None else cast(Segmenter, self.averaged.module)

    @property
    def _learned(self) -> list[nn.Parameter]:
        """Learned parts of the merging method."""
        return [] if self.method == PURE else patch.learned_parameters(self.model.encoder, self.method)

    def _freeze(self) -> None:
        """Let only those parts want gradients that are trained."""
        if self.config.optim.train_only is not None:
            self.model.requires_grad_(False)
        elif self.config.optim.freeze_encoder:
            self.model.encoder.requires_grad_(False)
            if self.model.has_queries:
                self.model.encoder.queries.requires_grad_(True)
        for parameter in self._learned:
            parameter.requires_grad_(True)

    def _cached_features(self, folder: Path | None) -> CachedFeatures | None:
        schedule = self.config.schedule
        n_versions = schedule.cache_features if schedule.updates else min(schedule.cache_features, schedule.epochs)
        if not n_versions:
            return None
        if self.train_set.skip_bad:
            raise ValueError("--cache-features: leave out --skip-bad-images; g2tm check names bad images")
        return CachedFeatures(self.train_set, folder or self.log_dir / FOLDER, n_versions)

    def _create_loader(self) -> Any:
        schedule = self.config.schedule
        size = schedule.batch_size // parallel.world_size()
        pins = self.device.type == "cuda"
        dataset, every = self.features or self.train_set, schedule.eval_every
        return create_loader(dataset, size, schedule.seed, self.workers, pin_memory=pins, n_batches=every)

    def _create_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer, with the factors of encoder, layers and learned parts."""
        optim, learned, encoder = self.config.optim, set(self._learned), self.model.encoder
        rates = {"depth": self.config.net.n_layers, "encoder": optim.encoder_lr_mult, "decay": optim.layer_decay}

        def scale(name: str, parameter: nn.Parameter) -> float:
            own = getattr(parameter, "learning_rate_scale", 1.0)
            return own if parameter in learned else layer_scale(name, **rates)

        made = create_optimizer(self.model, optim.optimizer, optim.learning_rate, optim.weight_decay, scale)
        # Without `self`: a trainer in a cycle keeps its workers until Python ends, which then waits for them.
        made.register_step_post_hook(lambda *_: patch.clamp_parts(encoder))
        return made

    # --- Where it is

    @property
    def steps_per_epoch(self) -> int:
        """Updates of an epoch: a round through the images, or what lies between two evaluations."""
        return len(self.loader)

    @property
    def n_steps(self) -> int:
        """Updates of the training."""
        return self.config.schedule.epochs * self.steps_per_epoch

    @property
    def epoch(self) -> int:
        """The epoch that is under way, counted from 0: until its evaluation is over and recorded."""
        return self.step // self.steps_per_epoch - (self._is_open and self.step % self.steps_per_epoch == 0)

    @property
    def epoch_step(self) -> int:
        """Updates of this epoch that are done."""
        return self.step - self.epoch * self.steps_per_epoch

    @property
    def is_finished(self) -> bool:
        """Return whether nothing is left to do."""
        return self._has_stopped or self.epoch >= self.config.schedule.epochs

    @property
    def _has_stopped(self) -> bool:
        """Return whether it ended before its last epoch, since mIoU does not rise."""
        patience, epochs = self.config.schedule.patience, self.config.schedule.epochs
        return patience is not None and self.n_worse >= patience and not self._is_open and self.epoch < epochs

    def state_dict(self, losses: Tensor | None = None) -> dict[str, Any]:
        """Content of a checkpoint, in the format of Segmenter, from which `load` goes on.

        Args:
            losses: (processes, 2), sum and number of the losses of this epoch; None: it has not begun.
        """
        return {
            "model": self.result.state_dict(),
            **({} if self.averaged is None else {"trained": self.model.state_dict()}),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "loss_scaler": self.precision.scaler.state_dict(),
            "epoch": self.epoch - 1,  # the last one that is over
            "updates": self.epoch_step,
            "updates_per_epoch": self.steps_per_epoch,
            "losses": losses,
            "best_mean_iou": self.best,
            "evaluations_since_best": self.n_worse,
            "n_cls": self.model.n_cls,
            "epochs": self.config.schedule.epochs,
            "images": self._images,
        }

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: it was not written by a training like this one.
        """
        try:
            epoch, updates = checkpoint["epoch"] + 1, checkpoint.get("updates", 0)
            best, losses = checkpoint["best_mean_iou"], checkpoint.get("losses")
            n_worse = checkpoint.get("evaluations_since_best", 0)
            fits = type(epoch) is int and epoch >= 0 and type(updates) is int and updates >= 0
            fits &= type(n_worse) is int and n_worse >= 0
            fits &= not updates or (isinstance(losses, Tensor) and losses.shape[1:] == (2,))
            if not fits or type(best) not in (int, float) or not -1 <= best <= 100:
                raise ValueError(f"it has epoch {brief(epoch - 1)}, updates {brief(updates)}, mIoU {brief(best)}")
            self.result.load_state_dict(checkpoint["model"])
            if self.averaged is not None:
                self.model.load_state_dict(checkpoint["trained"])
                self.averaged.n_averaged.fill_(1)  # 0 would begin a new average
            self._load_optimizer(checkpoint["optimizer"])
            if self.precision.scaler.is_enabled():
                self.precision.scaler.load_state_dict(checkpoint["loss_scaler"])
            shares = self.steps_per_epoch, parallel.world_size()  # by which the images of an epoch are shared out
            if updates and (checkpoint["updates_per_epoch"], len(losses)) != shares:
                logger.warning("epoch %d begins anew: %d updates of it had other batches", epoch + 1, updates)
                updates = 0
            self.step, self._is_open = epoch * self.steps_per_epoch + updates, updates > 0
            self.best, self.n_worse = best, n_worse
            if updates:
                self.losses.copy_(losses[parallel.rank()])
            self._say_changes(checkpoint)
        except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"cannot resume {self.log_dir} ({one_line(error)}): start a new run from it with --finetune"
            ) from error

    def _say_changes(self, checkpoint: Mapping[str, Any]) -> None:
        """Say where the run goes on under other conditions than those that it began with."""
        if checkpoint.get("images", self._images) != self._images:
            self.say(
                f"warning: the training images of {self.train_set.name}, or how they are augmented, are others than in "
                "the run so far"
            )
        before, schedule = checkpoint.get("epochs"), self.config.schedule
        if before not in (None, schedule.epochs):
            self.say(
                f"warning: the schedule is one of {schedule.course(schedule.epochs)} now, not of "
                f"{schedule.course(before)}, and the learning rate jumps to it: --finetune begins a new schedule from "
                "these weights"
            )

    @cached_property
    def _images(self) -> str:
        """Fingerprint of the training images that other machines find, too."""
        return fingerprint(self.train_set, dates=False)

    def _load_optimizer(self, saved: Mapping[str, Any]) -> None:
        """Load what an optimizer keeps of its parameters; its settings are those of the run."""
        own = self.optimizer.state_dict()["param_groups"]
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("its optimizer has other parameters")
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        for parameter, kept in self.optimizer.state.items():  # PyTorch looks at their shapes at the next update
            for key, value in kept.items():
                fits = isinstance(value, Tensor) and value.shape in ((), parameter.shape) and value.is_floating_point()
                if value is not None and not fits:
                    raise ValueError(f"{key} of the optimizer does not fit its parameter {tuple(parameter.shape)}")

    # --- What it does

    def fit(self) -> "Trainer":
        """Train for all epochs that are left.

        Raises:
            SignalError: a signal asked for the end; all that was done is saved.
            ValueError: another training writes to the run directory; a loss that is not finite, which names the images;
                a checkpoint that cannot be resumed.
        """
        try:
            return self._fit()
        finally:
            self.loader = self._create_loader()  # another one, so that the workers of this one end

    def _fit(self) -> "Trainer":
        with run_lock(self.log_dir), self._interruption.listening(), fast_float32(self.device):
            if self.resume:
                self.load(load_checkpoint(self.log_dir))
            if self.is_finished:
                schedule = self.config.schedule
                more = "--epochs" if schedule.updates is None else "--updates"
                how = f"has finished its {schedule.course(schedule.epochs)}"
                if self._has_stopped:
                    how, more = f"has ended early, after {schedule.course(self.epoch)}", "--patience"
                self.say(f"{self.log_dir} {how}: give more {more} to go on")
                return self
            if self.features is not None:
                self.features.fill(self.model, self.device, self.precision.autocast, self._interruption, self.workers)
            if parallel.world_size() > 1:
                self._share()
            if parallel.is_main():
                self.log = RunLog(self.log_dir, self.config, self.epoch)
            while not self.is_finished:
                self.start_epoch()
                for batch in self.batches():
                    self.train_step(batch)
                    self._save_if_asked()
                self.end_epoch()
            if self._has_stopped:
                course = self.config.schedule.course(self.epoch)
                self.say(f"ended after {course}: no better mIoU in {self.n_worse} evaluations (--patience)")
            if self.log is not None:
                self.log.close()
            if self.features is not None and not self._keeps_features:
                self.features.remove()
        return self

    def _objective(self) -> Objective:
        head = None if self.features is None else DecoderOnly(self.model, self.train_set.crop_size)
        method_loss = None if self.method == PURE else partial(patch.loss, self.model)
        optim, weight = self.config.optim, None
        if optim.class_weights is not None:
            weight = torch.tensor(optim.class_weights, device=self.device)
        return Objective(
            self.model, head and (lambda tokens: [head(tokens)]), method_loss, optim.loss.split(","), weight
        )

    def _share(self) -> None:
        """Let several processes train together."""
        parallel.on_parent_exit(self._interruption.request)
        for parameter in filter(lambda p: p.requires_grad, self.model.parameters()):
            parameter.register_hook(lambda grad: grad.contiguous().flatten().view(grad.shape))  # DDP minds strides
        layers = patch.options(self.model)["layers"] if self.method != PURE else ()
        unused = patch.has_unused_parts(self.model.encoder, self.method, layers)
        self.objective = DistributedDataParallel(self.objective, find_unused_parameters=unused)

    def start_epoch(self) -> None:
        """Set what belongs to the epoch under way, wherever in it the training goes on."""
        self.loader.sampler.epoch, self.loader.sampler.skip = self.epoch, self.epoch_step * self.loader.batch_size
        if self.curriculum is not None:
            for model in {self.model, self.result}:
                patch.set_threshold(model, self.curriculum.threshold(self.epoch))
        self.scheduler.step(self.epoch)
        if self.epoch_step == self.steps_per_epoch:
            self.scheduler.step_update(self.step - 1)
        self.model.train()
        self.meter = Meter()

    def batches(self) -> Iterator[dict[str, Tensor]]:
        """The batches that are left of the epoch under way."""
        first, total = self.epoch_step, self.steps_per_epoch
        label = f"epoch {self.epoch + 1}"
        iterator = iter(self.loader) if first < total else iter(())
        with tqdm(None, label, total, initial=first, unit="batch", leave=False, disable=not self.progress) as bar:
            for _ in range(first, total):
                start = time.perf_counter()
                batch = next(iterator)
                self.meter.wait += time.perf_counter() - start
                yield batch
                bar.update()
                if self.step % READ_EVERY == 0 or self.epoch_step == total:
                    bar.set_postfix(loss=f"{self._read_losses():.3f}", lr=f"{self._learning_rate:.2e}", refresh=False)

    def train_step(self, batch: Mapping[str, Tensor]) -> Tensor:
        """One update; returns its loss, detached.

        Args:
            batch: `image` (B, 3, h, w) and `label` (B, h, w), of this process.
        """
        self.scheduler.step_update(self.step)
        torch.manual_seed(mix_seeds(self.config.schedule.seed, self.step, parallel.rank()))  # for dropout and the like
        self.optimizer.zero_grad(set_to_none=True)
        images, labels = (batch[name].to(self.device, non_blocking=True) for name in ("image", "label"))
        loss, of_method = self._backward(images, labels)
        self._update()
        self.step, self._is_open = self.step + 1, True
        if self.model.has_queries:
            self.model.decoder.anneal(self.step / self.n_steps)
        if self.averaged is not None:
            self.averaged.update_parameters(self.model)
        self._measure(batch, loss, of_method)
        return loss

    def _backward(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Gradients of a batch, part by part; processes share those of the last one, which are the sums of all.

        Returns:
            The loss (), and what the merging method adds to it; None: nothing.
        """
        n_labelled = parallel.begin_sum((labels != ignore_label(self.model.n_cls)).sum())
        parts = [*zip(*(one.chunk(self.config.schedule.accumulate) for one in (images, labels)), strict=True)]
        losses, of_method = [], []
        for number, part in enumerate(parts, 1):
            is_alone = number < len(parts) and isinstance(self.objective, DistributedDataParallel)
            with self.objective.no_sync() if is_alone else nullcontext():
                with self.precision.autocast():
                    loss, own = self.objective(*part, n_labelled, len(part[0]) / len(images))
                self.precision.scaler.scale(loss).backward()
            losses.append(loss.detach())
            of_method += [] if own is None else [own]
        return torch.stack(losses).sum(), torch.stack(of_method).sum() if of_method else None

    def _update(self) -> None:
        scaler, clip = self.precision.scaler, self.config.optim.clip_grad
        if clip is not None:
            scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        scaler.step(self.optimizer)
        scaler.update()

    def _measure(self, batch: Mapping[str, Tensor], loss: Tensor, of_method: Tensor | None) -> None:
        """Count an update, without waiting for the device."""
        meter = self.meter
        meter.unread.append(loss)
        meter.n_images += len(batch["image"]) * parallel.world_size()
        meter.n_skipped += int(batch["skipped"].sum()) if "skipped" in batch else 0
        if of_method is not None:
            meter.method_losses.append(of_method)
        # The scaler leaves an update out whose gradients overflow, and lowers its scale: that loss does not count.
        counts = loss.isfinite() if self.precision.scaler.is_enabled() else torch.ones_like(loss, dtype=torch.bool)
        self.losses += torch.stack([loss.where(counts, 0), counts]).to(self.losses.dtype)

    @property
    def _learning_rate(self) -> float:
        """The one that the schedule says, before any parameter's own factor."""
        return max(group["lr"] / group.get("lr_scale", 1) for group in self.optimizer.param_groups)

    def _read_losses(self) -> float:
        """The last loss.

        Raises:
            ValueError: one that is not finite since the last reading; names the images. With a loss scaler: and its
                scale has fallen so far that overflow does not explain it.
        """
        losses = torch.stack(self.meter.unread).tolist()
        self.meter.unread.clear()
        scaler = self.precision.scaler
        if scaler.is_enabled() and scaler.get_scale() >= 1:
            return losses[-1]
        for loss, index in zip(losses, range(self.epoch_step - len(losses), self.epoch_step), strict=True):
            if not math.isfinite(loss):
                names = ", ".join(self.train_set.name_of(image) for image in self.loader.sampler.batch(index))
                raise ValueError(
                    f"the loss is {loss} in a batch of {names}: lower the learning rate, or look at these images"
                )
        return losses[-1]

    def end_epoch(self) -> None:
        """Evaluate if it is time, record the epoch, and save."""
        epoch, epochs, frequency = self.epoch, self.config.schedule.epochs, self.config.schedule.eval_freq
        entry = self._entry()
        if (epoch + 1) % frequency == 0 or epoch + 1 == epochs:
            self.save()
            entry |= {f"val_{key}": value for key, value in self.evaluate().items()}
        is_best = self._compare(entry)
        self._is_open = False
        self.losses.zero_()
        if self.log is not None:
            self._save_epoch(entry, is_best)
            self.say(summary(entry, self.config.schedule))

    def _entry(self) -> dict[str, Any]:
        """The record of an epoch whose updates are done; it waits for the device."""
        loss_sum, n_losses = parallel.all_gather(self.losses).sum(0).tolist()
        seconds, meter = time.perf_counter() - self.meter.begin, self.meter
        entry = {
            "epoch": self.epoch,
            "threshold": merging.of_model(self.model)["threshold"],
            "train_loss": loss_sum / max(n_losses, 1),
            "train_learning_rate": self._learning_rate,
            "num_updates": self.step,
            "images_per_second": meter.n_images / seconds,
            "data_wait": 100 * meter.wait / seconds,
            "memory_mb": peak_memory(self.device),
        }
        entry |= {"skipped_images": meter.n_skipped} if meter.n_skipped else {}
        if meter.method_losses:
            entry["train_method_loss"] = torch.stack(meter.method_losses).mean().item()
        return entry

    def evaluate(self) -> dict[str, float]:
        """Scores on the validation split, percent.

        Raises:
            SignalError: a signal.
        """
        with self.precision.autocast():
            confusion = evaluate(
                self.result.eval(),
                self.val_set,
                self.windows,
                device=self.device,
                workers=self.workers,
                on_image=self._stop_if_asked,
                progress=self.progress,
            )
        scores = segmentation_scores(confusion)
        return {key: scores[key] for key in SCORES}

    def _stop_if_asked(self, *_: Any) -> None:
        """End the training if a signal asks for it during an evaluation, before which it was saved."""
        if self._interruption.status:
            message = f"ended by a signal during the evaluation: {self.log_dir / LAST} holds all, go on with --resume"
            raise SignalError(message, self._interruption.status)

    def _save_if_asked(self) -> None:
        """Save if it is time, and end the training if a signal asks for it; all processes call it."""
        is_due = self.save_every is not None and time.monotonic() - self._saved > 60 * self.save_every
        request = self._requests.exchange(self._interruption.status or int(is_due and parallel.is_main()))
        if request and self.save() and request > 1:
            where = f"update {self.epoch_step} of {self.steps_per_epoch} of epoch {self.epoch + 1}"
            file = self.log_dir / LAST
            raise SignalError(f"ended by a signal after {where}, which {file} holds: go on with --resume", request)

    def save(self) -> bool:
        """Write the last checkpoint, wherever in an epoch; all processes call it.

        Returns:
            Whether it did: weights after a loss that is not finite are not worth it.
        """
        losses = parallel.all_gather(self.losses).cpu().double()
        if not losses.isfinite().all():
            return False
        if parallel.is_main():
            save_checkpoint(self.state_dict(losses), self.log_dir / LAST)
        self._saved = time.monotonic()
        return True

    def _compare(self, entry: Mapping[str, Any]) -> bool:
        """Compare the mIoU of an epoch, if there is one, with the highest; return whether it is higher."""
        # Scores at a threshold that merges less than the final one do not compete.
        competes = self.curriculum is None or entry["threshold"] == self.curriculum.target
        if not competes or "val_mean_iou" not in entry:
            return False
        is_best = entry["val_mean_iou"] > self.best
        self.best, self.n_worse = (entry["val_mean_iou"], 0) if is_best else (self.best, self.n_worse + 1)
        return is_best

    def _save_epoch(self, entry: Mapping[str, Any], is_best: bool) -> None:
        """Write the best checkpoint, the record, the last: in this order, what the last one holds is not done again."""
        state = self.state_dict()
        if is_best:
            save_checkpoint(state, self.log_dir / BEST)
        self.log.write(entry)
        save_checkpoint(state, self.log_dir / LAST)
        self._saved = time.monotonic()


def open_datasets(config: RunConfig, skip_bad: bool = False) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation split; the seed changes neither validation images nor versions with cached features."""
    data, schedule = config.data, config.schedule
    sizes: dict[str, Any] = {"image_size": data.im_size, "normalization": config.normalization}
    sizes |= {"bands": config.net.bands}
    training = {"crop_size": data.crop_size, "ratios": data.scale_range, "flip": data.flip}
    seed = 0 if schedule.cache_features else schedule.seed
    train_set = create_dataset(data.dataset, "train", seed=seed, value_range=data.value_range, **training, **sizes)
    val_set = create_dataset(data.dataset, "val", value_range=train_set.value_range, **sizes)
    train_set.skip_bad = val_set.skip_bad = skip_bad
    return train_set, val_set


def class_weights(
    given: str | Sequence[float] | None, classes: Sequence[str], inventory: Mapping[str, Any] | None
) -> list[float] | None:
    """The weight of every class in the loss; None: all are 1.

    Args:
        given: "auto", by `balanced_weights`; a YAML file with a list or with name: number; or the weights.
        classes: names.
        inventory: counts of the pixels, as `variant.yml` holds them.

    Raises:
        ValueError: no pixels were counted, or not one number from 0 for each class.
    """
    if given is None or not parallel.is_main():
        return None
    if given == "auto":
        pixels = (inventory or {}).get("train", {}).get("pixels", {})
        return balanced_weights([pixels.get(name, 0) for name in classes])
    found: Any = read_yaml(Path(given)) if isinstance(given, str) else given
    if isinstance(found, Mapping) and found.keys() == {*classes}:
        found = [found[name] for name in classes]
    if not isinstance(found, list) or not WEIGHTS.fits(found) or len(found) != len(classes) or not any(found):
        text = f"--class-weights {brief(given)}: give a number from 0 for each of the {len(classes)} classes"
        raise ValueError(f"{text}, {', '.join(classes)}, in a list or as name: number")
    return [float(value) for value in found]


def summary(entry: Mapping[str, Any], schedule: Schedule) -> str:
    """One line about an epoch."""
    score = f"  mIoU {entry['val_mean_iou']:.2f}" if "val_mean_iou" in entry else ""
    speed = f"{entry['images_per_second']:.1f} images/s, {entry['data_wait']:.0f} % of the time waiting for data"
    speed += f", loss of the method {entry['train_method_loss']:.4f}" if "train_method_loss" in entry else ""
    speed += f", {entry['skipped_images']} images skipped" if "skipped_images" in entry else ""
    place = f"epoch {entry['epoch'] + 1}/{schedule.epochs}"
    if schedule.updates is not None:
        place = f"update {entry['num_updates']}/{schedule.updates}"
    return f"{place}  loss {entry['train_loss']:.4f}  {speed}{score}"
