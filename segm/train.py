"""Train a Segmenter, plain or with a merging method, and evaluate it as it learns."""

from pathlib import Path

import click
import torch
import yaml
from click.core import ParameterSource
from torch.nn.parallel import DistributedDataParallel

import patch
from segm import parallel
from segm.auto_threshold import automatic_thresholds
from segm.checkpoint import BEST, LAST, load_checkpoint, one_line, read_variant, restore, save_checkpoint
from segm.config import config_dir
from segm.data import DATASETS, create_dataset
from segm.engine import Precision, compile_blocks, create_loader, train_one_epoch
from segm.eval.evaluate import evaluate
from segm.eval.sliding import Windows
from segm.metrics import segmentation_scores
from segm.model.decoder import DECODERS
from segm.model.factory import copy_weights, create_segmenter
from segm.optim import OPTIMIZERS, SCHEDULERS, create_optimizer, create_scheduler
from segm.options import (
    AUTO,
    PATCH_NAMES,
    PURE,
    Command,
    apply_patch,
    device_option,
    merging_settings,
    patch_options,
    variant_settings,
)
from segm.runlog import RunLog
from segm.settings import (
    CURRICULUM,
    PLACES,
    build_variant,
    check_resumable,
    complete_settings,
    finetuning_defaults,
    read_settings,
)

POSITIVE = click.IntRange(min=1)
RATE = click.FloatRange(min=0)


def read_config(ctx, param, value):
    """Make the entries of a recipe the defaults of the options."""
    if value is None:
        return
    recipes = config_dir() / "recipes"
    file = next((f for f in (Path(value), recipes / value, recipes / f"{value}.yml") if f.is_file()), None)
    if file is None:
        names = ", ".join(sorted(f.stem for f in recipes.glob("*.yml")))
        raise click.BadParameter(f"no file {value}; recipes in configs/recipes: {names}", ctx, param)
    try:
        recipe = yaml.safe_load(file.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise click.BadParameter(f"{file} is no YAML: {one_line(error)}", ctx, param) from error
    known = {option.name for option in ctx.command.params}
    if not isinstance(recipe, dict) or not set(recipe) <= known:
        unknown = ", ".join(sorted(set(recipe) - known)) if isinstance(recipe, dict) else "no mapping"
        raise click.BadParameter(f"{file}: {unknown}; its keys are the options of this command", ctx, param)
    ctx.default_map = recipe


@click.command(cls=Command)
@click.option(
    "--config",
    is_eager=True,
    expose_value=False,
    callback=read_config,
    help="YAML with options; a file, or a name in configs/recipes. Options given here override it.",
)
@click.option("--log-dir", type=click.Path(file_okay=False, path_type=Path), required=True, help="The run directory.")
@click.option("--dataset", type=click.Choice(DATASETS), help="Data set; all but shapes are read from $DATASET.")
@click.option("--backbone", help="Released name, or any plain ViT of timm.")
@click.option("--decoder", type=click.Choice(DECODERS), help="[default: mask_transformer]")
@click.option("--patch-size", type=POSITIVE, help="Pixels per patch side.  [default: the backbone's]")
@click.option("--d-model", type=POSITIVE, help="Width.  [default: the backbone's]")
@click.option("--n-heads", type=POSITIVE, help="Attention heads.  [default: the backbone's, or width / 64]")
@click.option("--n-layers", type=POSITIVE, help="Encoder blocks.  [default: the backbone's]")
@click.option("--pretrained", type=click.Path(exists=True, dir_okay=False), help="Weights of the encoder on disk.")
@click.option("--no-pretrained", is_flag=True, help="Start from random weights.  [default: timm's weights]")
@click.option("--im-size", type=POSITIVE, help="Shorter side of the images, pixels.  [default: the data set's]")
@click.option("--crop-size", type=POSITIVE, help="Side of the training crops, pixels.  [default: the data set's]")
@click.option("--window-size", type=POSITIVE, help="Sliding window, pixels.  [default: the data set's, or crop size]")
@click.option("--window-stride", type=POSITIVE, help="Its stride, pixels.  [default: the data set's]")
@click.option(
    "--normalization",
    type=click.Choice(["vit", "deit"]),
    help="Pixel mean and std.  [default: the backbone's]",
)
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="[default: sgd, momentum 0.9]")
@click.option("--scheduler", type=click.Choice(SCHEDULERS), help="polynomial: per iteration.  [default: polynomial]")
@click.option("--learning-rate", type=RATE, help="[default: the data set's]")
@click.option("--minlearning-rate", type=RATE, help="Where the schedule ends.  [default: 1e-5]")
@click.option("--weight-decay", type=RATE, help="[default: 0]")
@click.option("--warmup-epochs", type=click.IntRange(min=0), help="Epochs of linear warm-up.  [default: 0]")
@click.option("--start-factor", type=RATE, help="Where the warm-up starts, × learning rate.  [default: 1]")
@click.option("--dropout", type=click.FloatRange(0, 1), help="In the encoder.  [default: 0]")
@click.option("--decoder-dropout", type=click.FloatRange(0, 1), help="In the decoder.  [default: 0.1]")
@click.option("--drop-path", type=click.FloatRange(0, 1), help="Stochastic depth in the encoder.  [default: 0.1]")
@click.option("--batch-size", type=POSITIVE, help="Images per update, over all processes.  [default: the data set's]")
@click.option("--epochs", type=POSITIVE, help="[default: the data set's]")
@click.option("--eval-freq", type=POSITIVE, help="Epochs between evaluations.  [default: the data set's]")
@click.option("--num-workers", type=click.IntRange(min=0), help="Processes that read data, per process.  [default: 2]")
@click.option("--amp/--no-amp", default=None, help="Mixed precision: bfloat16, or float16 where that is missing.")
@click.option("--compile", is_flag=True, help="Compile attention and MLPs: slow at first, then faster.")
@click.option("--seed", type=click.IntRange(min=0), help="Of weights, order and augmentation.  [default: 0]")
@click.option("--resume/--no-resume", default=False, show_default=True, help="Continue the run in --log-dir.")
@click.option("--finetune", type=click.Path(exists=True, path_type=Path), help="Start from this checkpoint or run.")
@device_option
@patch_options
@click.option(
    "--from",
    "unpatched",
    type=click.Path(exists=True, path_type=Path),
    help="Unpatched checkpoint or run that --threshold auto looks at.",
)
@click.option("--start-thresh", type=float, help="Curriculum: threshold at the start.")
@click.option("--curric-warmup", type=click.IntRange(min=0), help="Curriculum: epochs at the start threshold.")
@click.option("--curric-period", type=POSITIVE, help="Curriculum: epochs between steps of -0.01.")
@click.pass_context
def main(ctx, log_dir, pretrained, no_pretrained, resume, finetune, unpatched, device, compile, **given):
    """Train a Segmenter and write checkpoints, variant.yml, log.txt and TensorBoard events to the run directory.

    Every option that is not given comes from --config, then from the run that is resumed or fine-tuned, then from
    the defaults of the data set.
    """
    with parallel.process_group(device) as device:
        weights = _pretrained(pretrained, no_pretrained, resume, finetune)
        saved = _saved_variant(log_dir, resume, finetune)
        given = _drop_recipe_merging(ctx, given)
        if given["threshold"] == AUTO:  # all that is asked for is checked before images are read
            checked = _plan(given | {"threshold": None}, saved, resume)
            given["threshold"] = _automatic_threshold(*checked[:2], unpatched, device)
        variant, merging, curriculum = _plan(given, saved, resume)
        settings = read_settings(variant)
        _check_batch(settings["batch_size"])
        train_set, val_set = _open_datasets(settings)
        _record_classes(variant, train_set)
        torch.manual_seed(settings["seed"])
        model = create_segmenter(variant["net_kwargs"], weights)
        if finetune is not None:
            copy_weights(model, finetune)
        apply_patch(model, *merging)
        _record_merging(variant, model, merging[0], curriculum)
        if compile:
            compile_blocks([*model.encoder.blocks, *model.decoder.blocks])
        train(model.to(device), train_set, val_set, variant, log_dir, device, curriculum, resume)


def train(model, train_set, val_set, variant, log_dir, device, curriculum=None, resume=False):
    """Train for all epochs of the variant that are left.

    Args:
        model: a Segmenter on `device`, patched or not.
        train_set, val_set: from `segm.data.create_dataset`.
        variant: content of `variant.yml`; it is written to `log_dir`.
        curriculum: `patch.Curriculum` or None.
        resume: continue from the last checkpoint in `log_dir`.
    """
    settings = read_settings(variant)
    workers, seed, epochs = settings["num_workers"], settings["seed"], settings["epochs"]
    precision = Precision.choose(device, settings["amp"])
    batch_size = settings["batch_size"] // parallel.world_size()
    loader = create_loader(train_set, batch_size, seed, workers, pin_memory=device.type == "cuda")
    optimizer = create_optimizer(model, settings["optimizer"], settings["learning_rate"], settings["weight_decay"])
    scheduler = _scheduler(optimizer, settings, len(loader))
    start_epoch, best = restore(log_dir, model, optimizer, precision.scaler) if resume else (0, -1.0)
    if start_epoch >= epochs:
        raise ValueError(f"{log_dir} has finished its {epochs} epochs: give more --epochs to go on")
    wrapped = DistributedDataParallel(model) if parallel.world_size() > 1 else model
    windows = Windows(settings["window_size"], settings["window_stride"])
    main_process = parallel.is_main()
    log = RunLog(log_dir, variant, start_epoch) if main_process else None

    for epoch in range(start_epoch, epochs):
        if curriculum is not None:
            patch.set_threshold(model, curriculum.threshold(epoch))
        entry = {"epoch": epoch, "threshold": _threshold(model)}
        entry |= train_one_epoch(
            wrapped, loader, optimizer, scheduler, precision, epoch, device=device, seed=seed, progress=main_process
        )
        if (epoch + 1) % settings["eval_freq"] == 0 or epoch + 1 == epochs:
            with precision.autocast():
                confusion = evaluate(
                    model.eval(), val_set, windows, device=device, workers=workers, progress=main_process
                )
            scores = segmentation_scores(confusion)
            entry |= {f"val_{key}": scores[key] for key in ("pixel_accuracy", "mean_accuracy", "mean_iou")}
        if main_process:
            # Scores at a threshold that merges less than the final one do not compete.
            final = curriculum is None or entry["threshold"] == curriculum.target
            score = entry.get("val_mean_iou", -1.0) if final else -1.0
            is_best, best = score > best, max(score, best)
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "lr_scheduler": scheduler.state_dict(),
                "loss_scaler": precision.scaler.state_dict(),
                "epoch": epoch,
                "best_mean_iou": best,
                "n_cls": model.n_cls,
            }
            if is_best:
                save_checkpoint(state, log_dir / BEST)
            log.write(entry)
            save_checkpoint(state, log_dir / LAST)  # at the end: what it holds need not be done again
            _show(entry, epochs)
    if main_process:
        log.close()


def _scheduler(optimizer, settings, updates_per_epoch):
    return create_scheduler(
        optimizer,
        settings["scheduler"],
        epochs=settings["epochs"],
        updates_per_epoch=updates_per_epoch,
        learning_rate=settings["learning_rate"],
        min_lr=settings["minlearning_rate"],
        warmup_epochs=settings["warmup_epochs"],
        start_factor=settings["start_factor"],
    )


def _threshold(model):
    """The threshold that the model merges with, None if it has none."""
    return patch.settings(model).get("threshold") if patch.is_patched(model) else None


def _show(entry, epochs):
    score = f"  mIoU {entry['val_mean_iou']:.2f}" if "val_mean_iou" in entry else ""
    speed = f"{entry['images_per_second']:.1f} images/s, {entry['data_wait']:.0f} % of the time waiting for data"
    click.echo(f"epoch {entry['epoch'] + 1}/{epochs}  loss {entry['train_loss']:.4f}  {speed}{score}")


def _saved_variant(log_dir, resume, finetune):
    """The variant whose settings are the defaults: all of the resumed run's, or what fine-tuning keeps."""
    if (log_dir / LAST).exists() and not resume:
        raise click.UsageError(f"{log_dir} holds a run: continue it with --resume, or choose another --log-dir")
    if resume and finetune is not None:
        raise click.UsageError("--resume and --finetune: choose one of them")
    if resume:
        load_checkpoint(log_dir)
        return read_variant(log_dir)
    return finetuning_defaults(read_variant(finetune)) if finetune is not None else {}


def _drop_recipe_merging(ctx, given):
    """With another --patch-type than the recipe's, forget what the recipe says about merging."""
    recipe = ctx.default_map or {}
    if given["patch_type"] == recipe.get("patch_type"):
        return given
    from_recipe = {name for name in given if ctx.get_parameter_source(name) == ParameterSource.DEFAULT_MAP}
    return given | dict.fromkeys(from_recipe & {*PATCH_NAMES, *CURRICULUM})


def _automatic_threshold(variant, merging, unpatched, device):
    """Mean + std of the similarities of an unpatched run in the first layer that shall merge."""
    method, options = merging
    if unpatched is None:
        raise click.UsageError("--threshold auto: name an unpatched run with --from")
    if "threshold" not in options:
        raise click.UsageError(f"--threshold auto: {method} has no threshold, name a method that has with --patch-type")
    settings, layer = read_settings(variant), options["layers"][0]
    found = automatic_thresholds(unpatched, settings["dataset"], [layer], device, side=settings["crop_size"])
    threshold = round(found[layer].threshold, 4)
    if parallel.is_main():
        click.echo(f"threshold {threshold}, from layer {layer} of {unpatched}")
    return threshold


def _plan(given, saved, resume):
    """All settings of the run.

    Returns:
        (variant without what only data and model tell, (method, options), curriculum or None).
    """
    options = {name: given[name] for name in PLACES if given.get(name) is not None}
    before = read_settings(saved)
    if resume:
        check_resumable(options, before)
    settings = complete_settings(options, before)
    saved_data = saved.get("dataset_kwargs", {})
    method, merging = merging_settings({name: given[name] for name in PATCH_NAMES}, saved_data)
    if method != PURE:
        side = settings["crop_size"] // settings["patch_size"]
        merging = patch.check(method, settings["n_layers"], (side, side), **merging)
    curriculum = _curriculum(given, saved_data, method, merging)
    if curriculum is not None and curriculum.epochs > settings["epochs"]:
        raise click.UsageError(
            f"the curriculum reaches its threshold and trains with it in {curriculum.epochs} epochs, "
            f"not in {settings['epochs']}: give more --epochs or a shorter curriculum"
        )
    return build_variant(settings, saved.get("net_kwargs", {}).get("decoder")), (method, merging), curriculum


def _curriculum(given, saved, method, merging):
    """Threshold curriculum from the options, or from the run that goes on with the same method."""
    values = {name: given[name] for name in CURRICULUM}
    if method != PURE and method == saved.get("patch_type"):
        values = {k: saved.get(CURRICULUM[k]) if v is None else v for k, v in values.items()}
    if all(value is None for value in values.values()):
        return None
    if any(value is None for value in values.values()) or "threshold" not in merging:
        raise click.UsageError("a curriculum takes --threshold, --start-thresh, --curric-warmup and --curric-period")
    return patch.Curriculum(
        values["start_thresh"], merging["threshold"], values["curric_warmup"], values["curric_period"]
    )


def _record_merging(variant, model, method, curriculum):
    settings = {} if method == PURE else patch.settings(model)
    entries = variant_settings(method, settings)
    if curriculum is not None:
        values = (curriculum.start, curriculum.warmup, curriculum.period)
        entries |= dict(zip(CURRICULUM.values(), values, strict=True))
    variant["dataset_kwargs"] |= entries


def _check_batch(batch_size):
    if batch_size % parallel.world_size():
        raise click.UsageError(f"--batch-size {batch_size}: give a multiple of the {parallel.world_size()} processes")


def _open_datasets(settings):
    """Training and validation split; the validation images never depend on the seed of the training."""
    sizes = {"image_size": settings["im_size"], "normalization": settings["normalization"]}
    return (
        create_dataset(settings["dataset"], "train", crop_size=settings["crop_size"], seed=settings["seed"], **sizes),
        create_dataset(settings["dataset"], "val", **sizes),
    )


def _record_classes(variant, dataset):
    """Note the number of classes; of the user's own data also names and colors, so that pictures need no files."""
    variant["net_kwargs"]["n_cls"] = variant["net_kwargs"]["decoder"]["n_cls"] = dataset.n_cls
    if dataset.name == "folder":
        variant["dataset_kwargs"]["classes"] = [
            {"id": index, "name": name, "color": color}
            for index, (name, color) in enumerate(zip(dataset.classes, dataset.palette.tolist(), strict=True))
        ]


def _pretrained(file, disabled, resume, finetune):
    """Where the encoder's first weights come from: a file, timm (True), or nowhere (False)."""
    without = disabled or resume or finetune is not None
    if file is not None and without:
        raise click.UsageError("--pretrained goes neither with --no-pretrained nor with --resume or --finetune")
    return file or not without


if __name__ == "__main__":
    main()
