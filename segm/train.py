"""Train a Segmenter, plain or with a merging method, and evaluate it as it learns."""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch.nn.parallel import DistributedDataParallel

import patch
from segm import parallel
from segm.auto_threshold import automatic_thresholds
from segm.checkpoint import LAST, Progress, restore, training_state
from segm.cli import device_option
from segm.data import SegmentationDataset, create_dataset
from segm.engine import Position, Precision, compile_blocks, create_loader, segmentation_loss, train_one_epoch
from segm.eomt_loss import eomt_loss
from segm.eval.evaluate import evaluate
from segm.eval.sliding import Windows
from segm.features import FOLDER, CachedFeatures, Head
from segm.interruption import Interruption, SignalError
from segm.keeper import Keeper, only_writer, position_in
from segm.merging import PURE, MergingCommand, add_parts, build_model, is_given, mean_tokens
from segm.merging import apply as apply_merging
from segm.merging import of_model as merging_of
from segm.metrics import segmentation_scores
from segm.model.factory import copy_weights
from segm.model.segmenter import InTraining, Segmenter
from segm.optim import create_optimizer, create_scheduler, layer_scale
from segm.plan import CURRICULUM, Plan, Settings, finetuning_defaults, names_of, read_config, settings_options
from segm.run import Run, recorded_classes, require_classes
from segm.runlog import RunLog
from segm.segvit_loss import segvit_loss
from segm.variant import read_variant

OWN_LOSSES = {"segvit": segvit_loss, "eomt": eomt_loss}  # of decoders that learn from more than logits
AUTO = "auto"
N_VIEWS, FEW = 8, 0.25  # images that its tokens are counted on; share of the tokens that is suspicious
N_MASKS, N_HEADERS = 200, 5000  # looked at in every split before a training: a few seconds


@click.command(cls=MergingCommand)
@click.option(
    "--config",
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML with options; a file, or a name in configs/recipes. Options given here override it.",
)
@click.option("--log-dir", type=click.Path(file_okay=False, path_type=Path), required=True, help="The run directory.")
@settings_options
@click.option("--pretrained", type=click.Path(exists=True, dir_okay=False), help="Weights of the encoder on disk.")
@click.option("--no-pretrained", is_flag=True, help="Start from random weights.  [default: timm's weights]")
@click.option(
    "--resume/--no-resume",
    default=False,
    show_default=True,
    help="Continue the run in --log-dir; where there is none yet, start it.",
)
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    metavar="MINUTES",
    default=15,
    show_default=True,
    help="Save inside an epoch, too; 0: only after epochs.",
)
@click.option("--finetune", type=click.Path(exists=True, path_type=Path), help="Start from this checkpoint or run.")
@click.option(
    "--skip-bad-images", is_flag=True, help="Leave out images that cannot be read, and count them, instead of ending."
)
@click.option(
    "--feature-folder",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where --cache-features keeps them, for other trainings too.  [default: the run directory, until the end]",
)
@click.option("--compile", is_flag=True, help="Compile attention and MLPs: slow at first, then faster.")
@device_option
@click.option(
    "--from",
    "unpatched",
    type=click.Path(exists=True, path_type=Path),
    help="Unpatched checkpoint or run that --threshold auto looks at: mean + std of its similarities.",
)
@click.pass_context
def main(
    ctx: click.Context,
    log_dir: Path,
    pretrained: str | None,
    no_pretrained: bool,
    resume: bool,
    save_every: float,
    finetune: Path | None,
    skip_bad_images: bool,
    feature_folder: Path | None,
    compile: bool,
    device: torch.device,
    unpatched: Path | None,
    merging: dict[str, Any],
    **given: Any,
) -> None:
    """Train a Segmenter and write checkpoints, variant.yml, log.txt and TensorBoard events to the run directory.

    Every option that is not given comes from --config, then from the run that is resumed or fine-tuned, then from
    the defaults of the data set.
    """
    with parallel.process_group(device) as device:
        if resume and not (log_dir / LAST).exists():
            resume = False
            say(f"no checkpoint in {log_dir} yet: the training begins")
        weights = first_weights(pretrained, no_pretrained, resume, finetune)
        saved = saved_variant(log_dir, resume, finetune)
        given |= {name: None for name in names_of(CURRICULUM) if not is_given(ctx, name, merging.get("patch_type"))}
        if merging.get("threshold") == AUTO:  # all that is asked for is checked before images are read
            checked = Plan.make(given, {k: v for k, v in merging.items() if k != "threshold"}, saved, resume)
            merging["threshold"] = automatic_threshold(checked, unpatched, device)
        plan = Plan.make(given, merging, saved, resume)
        if plan.settings.batch_size % parallel.world_size():
            size, n_processes = plan.settings.batch_size, parallel.world_size()
            raise ValueError(f"--batch-size {size}: give a multiple of the {n_processes} processes")
        train_set, val_set = open_datasets(plan.settings)
        train_set.skip_bad = val_set.skip_bad = skip_bad_images
        if resume:
            require_classes(recorded_classes(saved), train_set, str(log_dir))
        variant = plan.variant(train_set)
        inventories = look_at(train_set, val_set)
        if inventories:
            variant["dataset_kwargs"]["inventory"] = inventories
        torch.manual_seed(plan.settings.seed)
        if plan.settings.cache_features and skip_bad_images:
            raise ValueError("--cache-features: leave out --skip-bad-images; scripts/check_dataset.py names bad images")
        model = create_model(variant["net_kwargs"], weights, finetune, train_set.classes)
        apply_merging(model, plan.method, plan.options)
        freeze(model, plan)
        if compile:
            for stack in (model.encoder, model.decoder):
                compile_blocks(stack.blocks)
        try:
            train(
                model.to(device),
                train_set,
                val_set,
                plan,
                variant,
                log_dir,
                device,
                resume,
                save_every or None,
                feature_folder,
            )
        except SignalError as interrupted:
            say(str(interrupted))
            ctx.exit(interrupted.status)


def say(text: str) -> None:
    """Print a line, once for all processes."""
    if parallel.is_main():
        click.echo(text)


def first_weights(pretrained: str | None, disabled: bool, resume: bool, finetune: Path | None) -> str | bool:
    """Where the encoder's first weights come from: a file, timm (True), or nowhere (False)."""
    if pretrained is not None and (disabled or finetune is not None):
        raise ValueError("--pretrained goes neither with --no-pretrained nor with --finetune")
    return False if disabled or resume or finetune is not None else pretrained or True


def saved_variant(log_dir: Path, resume: bool, finetune: Path | None) -> dict[str, Any]:
    """The variant whose settings are the defaults: all of the resumed run's, or what fine-tuning keeps."""
    if (log_dir / LAST).exists() and not resume:
        raise ValueError(f"{log_dir} holds a run: continue it with --resume, or choose another --log-dir")
    if resume:
        return read_variant(log_dir)
    return finetuning_defaults(read_variant(finetune)) if finetune is not None else {}


def automatic_threshold(plan: Plan, unpatched: Path | None, device: torch.device) -> float:
    """Mean + std of the similarities of an unpatched run in the first layer that shall merge.

    The rule knows nothing of what it leaves: where that is little, a line says so.
    """
    if unpatched is None:
        raise ValueError("--threshold auto: name an unpatched run with --from")
    if "threshold" not in plan.options:
        raise ValueError(f"--threshold auto: {plan.method} has no threshold, name a method that has with --patch-type")
    layer, size = plan.options["layers"][0], plan.settings.crop_size
    found = automatic_thresholds(unpatched, plan.settings.dataset, [layer], device, size=size)
    threshold = round(found[layer].threshold, 4)
    pure = Run.load(unpatched, device=device, patch_type=PURE)
    merged = pure.variation(plan.method, plan.options | {"threshold": threshold})
    views = [*merged.views(plan.settings.dataset, N_VIEWS)]
    left = mean_tokens(merged.model, views) / math.prod(merged.model.grid(views[0].shape[-2:]))
    say(f"threshold {threshold}, from layer {layer} of {unpatched}: {left:.0%} of the tokens are left")
    if left < FEW:
        say("warning: so few tokens lose accuracy, measure a threshold with segm/tune_threshold.py")
    return threshold


def open_datasets(settings: Settings) -> tuple[SegmentationDataset, SegmentationDataset]:
    """Training and validation split; the validation images never depend on the seed of the training, nor do the
    augmented versions whose features are cached: trainings with other seeds share them."""
    sizes: dict[str, Any] = {"image_size": settings.im_size, "normalization": settings.normalization}
    seed = 0 if settings.cache_features else settings.seed
    return (
        create_dataset(
            settings.dataset, "train", crop_size=settings.crop_size, seed=seed, ratios=settings.scale_range, **sizes
        ),
        create_dataset(settings.dataset, "val", **sizes),
    )


def look_at(*datasets: SegmentationDataset) -> dict[str, Any]:
    """Look at the files before the first update, in the main process; split -> what it holds, for `variant.yml`.

    Raises:
        FileNotFoundError, ValueError: see `segm.data.inventory`.
    """
    if datasets[0].name == "shapes" or not parallel.is_main():
        return {}
    from segm.data.inventory import take_inventory  # imports mmseg, which `shapes` does without

    found = [take_inventory(one, n_masks=N_MASKS, n_headers=N_HEADERS, skip_bad=one.skip_bad) for one in datasets]
    for inventory in found:
        click.echo("\n".join(inventory.lines()))
    return {inventory.split: inventory.record() for inventory in found}


def create_model(
    net_kwargs: dict[str, Any], weights: str | bool, finetune: Path | None, classes: Sequence[str]
) -> Segmenter:
    """A model with its first weights; parts of a method that the run to start from lacks begin at random."""
    if finetune is None:
        return build_model(net_kwargs, weights)
    variant = read_variant(finetune)
    known = variant["net_kwargs"].get("reduction")
    model = build_model(net_kwargs | {"reduction": known})
    recorded = recorded_classes(variant)
    copy_weights(model, finetune, same_classes=recorded is None or recorded == tuple(classes))
    if not known and "reduction" in net_kwargs:
        add_parts(model.encoder, net_kwargs["reduction"])
    return model


def freeze(model: Segmenter, plan: Plan) -> None:
    """Let only those parts want gradients that the plan trains.

    Raises:
        ValueError: nothing is left to train.
    """
    learned = patch.learned_parameters(model.encoder, plan.method) if plan.method != PURE else []
    if plan.settings.train_only is not None:
        model.requires_grad_(False)
    elif plan.settings.freeze_encoder:
        model.encoder.requires_grad_(False)
        if model.joins:
            model.encoder.queries.requires_grad_(True)
    for parameter in learned:
        parameter.requires_grad_(True)


def build_optimizer(model: Segmenter, plan: Plan) -> torch.optim.Optimizer:
    """The optimizer of a plan, with the factors of encoder, layers and learned parts."""
    settings = plan.settings
    rates = {"depth": settings.n_layers, "encoder": settings.encoder_lr_mult, "decay": settings.layer_decay}
    learned = set(patch.learned_parameters(model.encoder, plan.method)) if plan.method != PURE else set()

    def scale(name: str, parameter: torch.nn.Parameter) -> float:
        own = getattr(parameter, "learning_rate_scale", 1.0)
        return own if parameter in learned else layer_scale(name, **rates)

    optimizer = create_optimizer(model, settings.optimizer, settings.learning_rate, settings.weight_decay, scale)
    optimizer.register_step_post_hook(lambda *_: patch.clamp_parts(model.encoder))
    return optimizer


def train(
    model: Segmenter,
    train_set: SegmentationDataset,
    val_set: SegmentationDataset,
    plan: Plan,
    variant: dict[str, Any],
    log_dir: Path,
    device: torch.device,
    resume: bool = False,
    save_every: float | None = None,
    feature_folder: Path | None = None,
) -> None:
    """Train for all epochs of the plan that are left.

    Args:
        model: a Segmenter on `device`, patched or not.
        train_set, val_set: from `segm.data.create_dataset`.
        plan: `Plan`.
        variant: its content of `variant.yml`, which is written to `log_dir`.
        resume: continue from the last checkpoint in `log_dir`.
        save_every: minutes between checkpoints inside an epoch; None: only after epochs.
        feature_folder: where cached features are kept; None: in `log_dir`, until the training ends.

    Raises:
        SignalError: a signal asked for the end; all that was done is saved.
    """
    settings, curriculum = plan.settings, plan.curriculum
    workers, seed, epochs = settings.num_workers, settings.seed, settings.epochs
    precision = Precision.choose(device, settings.amp)
    batch_size = settings.batch_size // parallel.world_size()
    cached = None
    if settings.cache_features:
        cached = CachedFeatures(train_set, feature_folder or log_dir / FOLDER, min(settings.cache_features, epochs))
    loader = create_loader(cached or train_set, batch_size, seed, workers, pin_memory=device.type == "cuda")
    optimizer = build_optimizer(model, plan)
    scheduler = create_scheduler(
        optimizer,
        settings.scheduler,
        epochs=epochs,
        updates_per_epoch=len(loader),
        learning_rate=settings.learning_rate,
        min_lr=settings.minlearning_rate,
        warmup_epochs=settings.warmup_epochs,
        start_factor=settings.start_factor,
    )
    interruption = Interruption()
    with only_writer(log_dir), interruption.listening():
        begun = restore(log_dir, model, optimizer, precision.scaler) if resume else Progress()
        if begun.epoch >= epochs:
            say(f"{log_dir} has finished its {epochs} epochs: give more --epochs to go on")
            return
        if parallel.world_size() > 1:
            parallel.when_orphaned(interruption.request)
        state = partial(training_state, model, optimizer, scheduler, precision.scaler)
        keeper = Keeper(log_dir, state, begun.best, len(loader), save_every, interruption)
        wrapped: torch.nn.Module = InTraining(model) if model.trains_apart else model
        if cached is not None:
            wrapped = Head(model, train_set.crop_size)
            cached.fill(model, device, precision.autocast, interruption)
        if parallel.world_size() > 1:
            for parameter in filter(lambda p: p.requires_grad, model.parameters()):
                parameter.register_hook(lambda grad: grad.contiguous().flatten().view(grad.shape))  # DDP minds strides
            resting = patch.has_unused_parts(model.encoder, plan.method, plan.options.get("layers", ()))
            wrapped = DistributedDataParallel(wrapped, find_unused_parameters=resting)
        windows = Windows.of(settings.window_size, settings.window_stride)
        main_process = parallel.is_main()
        log = RunLog(log_dir, variant, begun.epoch) if main_process else None
        position = position_in(begun, len(loader), device)

        criterion = OWN_LOSSES.get(settings.decoder, segmentation_loss)
        of_method: list[torch.Tensor] = []  # what the method adds to the loss of every update

        def loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            own = patch.loss(model, labels) if plan.method != PURE else 0.0
            if isinstance(own, torch.Tensor):
                of_method.append(own.detach())
            return criterion(logits, labels) + own

        for epoch in range(begun.epoch, epochs):
            if curriculum is not None:
                patch.set_threshold(model, curriculum.threshold(epoch))
            if model.joins:
                model.decoder.anneal(epoch / epochs)
            entry = {"epoch": epoch, "threshold": merging_of(model)["threshold"]}
            position = position or Position.beginning(device)
            entry |= train_one_epoch(
                wrapped,
                loader,
                optimizer,
                scheduler,
                precision,
                epoch,
                device=device,
                seed=seed,
                position=position,
                loss=loss,
                after_update=partial(keeper.after_update, epoch),
                progress=main_process,
            )
            if of_method:
                entry["train_method_loss"] = torch.stack(of_method).mean().item()
                of_method.clear()
            if (epoch + 1) % settings.eval_freq == 0 or epoch + 1 == epochs:
                keeper.save(epoch, position)
                with precision.autocast():
                    confusion = evaluate(
                        model.eval(),
                        val_set,
                        windows,
                        device=device,
                        workers=workers,
                        on_image=keeper.after_image,
                        progress=main_process,
                    )
                scores = segmentation_scores(confusion)
                entry |= {f"val_{key}": scores[key] for key in ("pixel_accuracy", "mean_accuracy", "mean_iou")}
            if log is not None:
                # Scores at a threshold that merges less than the final one do not compete.
                final = curriculum is None or entry["threshold"] == curriculum.target
                keeper.save_epoch(epoch, entry.get("val_mean_iou", -1.0) if final else -1.0, partial(log.write, entry))
                show(entry, epochs)
            position = None
        if log is not None:
            log.close()
        if cached is not None and feature_folder is None:
            cached.remove()


def show(entry: dict[str, Any], epochs: int) -> None:
    """Print one line about an epoch."""
    score = f"  mIoU {entry['val_mean_iou']:.2f}" if "val_mean_iou" in entry else ""
    speed = f"{entry['images_per_second']:.1f} images/s, {entry['data_wait']:.0f} % of the time waiting for data"
    speed += f", loss of the method {entry['train_method_loss']:.4f}" if "train_method_loss" in entry else ""
    speed += f", {entry['skipped_images']} images skipped" if "skipped_images" in entry else ""
    click.echo(f"epoch {entry['epoch'] + 1}/{epochs}  loss {entry['train_loss']:.4f}  {speed}{score}")


if __name__ == "__main__":
    main()
