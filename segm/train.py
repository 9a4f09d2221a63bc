"""Train a Segmenter, plain or with a merging method, and evaluate it as it learns."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from segm import parallel
from segm.auto_threshold import threshold_for
from segm.checkpoint import LAST
from segm.cli import FOLDER, SETTING_GROUPS, device_option, print_once, read_recipe, settings_options
from segm.config import CURRICULUM, Preset, RunConfig
from segm.merging import MergingCommand, is_given
from segm.parallel import SignalError
from segm.resolve import resolve
from segm.trainer import Trainer

AUTO = "auto"
EXISTING = click.Path(exists=True, path_type=Path)


@click.command(cls=MergingCommand, groups=SETTING_GROUPS)
@click.option(
    "--config",
    is_eager=True,
    expose_value=False,
    callback=read_recipe,
    help="YAML file with options, or the name of a recipe; options given here override it.  [default: none]",
)
@click.option("--log-dir", type=FOLDER, required=True, help="Run directory to write to.")
@settings_options
@click.option(
    "--pretrained",
    type=click.Path(exists=True, dir_okay=False),
    help="File with the initial weights of the encoder.  [default: timm's]",
)
@click.option("--no-pretrained", is_flag=True, help="Start from random weights instead of timm's.")
@click.option(
    "--resume/--no-resume", default=False, help="Continue the run in --log-dir, or start it if there is none yet."
)
@click.option(
    "--save-every",
    type=click.FloatRange(min=0),
    metavar="MINUTES",
    default=15,
    help="Minutes between checkpoints inside an epoch; 0 saves after epochs only.",
)
@click.option("--finetune", type=EXISTING, help="Checkpoint or run to start from.  [default: none]")
@click.option("--skip-bad-images", is_flag=True, help="Skip and count images that cannot be read, instead of stopping.")
@click.option(
    "--feature-folder",
    type=FOLDER,
    help="Folder for --cache-features that trainings share.  [default: the run directory, deleted at the end]",
)
@click.option("--compile", is_flag=True, help="Compile attention and MLPs: slow at first, then faster.")
@device_option
@click.option(
    "--from",
    "unpatched",
    type=EXISTING,
    help="Checkpoint or run without merging: --threshold auto is mean + std of its similarities.  [default: none]",
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
    if pretrained is not None and (no_pretrained or finetune is not None):
        raise ValueError("--pretrained goes neither with --no-pretrained nor with --finetune")
    with parallel.process_group(device) as device:
        resume = goes_on(log_dir, resume)
        base = RunConfig.read(log_dir) if resume else finetune and RunConfig.read(finetune).for_finetuning()
        if (preset := merging.pop("preset", None)) is not None:
            if not isinstance(base, RunConfig) or finetune is None:
                raise ValueError(f"--preset {preset}: name the run that has it with --finetune")
            if not resume:  # what is resumed has recorded its merging
                base = replace(base, merging=Preset.read(finetune, preset).merging)
        given |= {name: None for name in CURRICULUM if not is_given(ctx, name, merging.get("patch_type"))}
        if merging.get("threshold") == AUTO:  # all that is asked for is checked before images are read
            checked = resolve(given | {k: v for k, v in merging.items() if k != "threshold"}, base, resume=resume)
            merging["threshold"] = threshold_for(checked, unpatched, device, print_once)
        try:
            Trainer(
                resolve(given | merging, base, resume=resume),
                log_dir,
                device=device,
                weights=pretrained or not no_pretrained,
                finetune=finetune,
                resume=resume,
                save_every=save_every or None,
                skip_bad_images=skip_bad_images,
                feature_folder=feature_folder,
                compile=compile,
                progress=True,
                say=print_once,
            ).fit()
        except SignalError as interrupted:
            print_once(str(interrupted))
            ctx.exit(interrupted.status)


def goes_on(log_dir: Path, resume: bool) -> bool:
    """Return whether the run in a directory is continued, which the main process decides for all.

    Raises:
        ValueError: there is one, and nobody asked for it.
    """
    exists = parallel.from_main((log_dir / LAST).exists())
    if exists and not resume:
        raise ValueError(f"{log_dir} holds a run: continue it with --resume, or choose another --log-dir")
    if resume and not exists:
        print_once(f"no checkpoint in {log_dir} yet: the training begins")
    return exists


if __name__ == "__main__":
    main()
