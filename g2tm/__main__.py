"""The command `g2tm`: one name for all commands. The only file of g2tm that knows `segm`: it imports what is called."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import click

import segm


class LazyCommand(click.Command):
    """A command whose module is imported when it is called: most of them import torch, which takes seconds.

    Args:
        name: of the command.
        where: its module, as the checkout names it.
        text: a sentence for the overview.
    """

    def __init__(self, name: str, where: str, text: str) -> None:
        super().__init__(name, short_help=text)
        self.where = where

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        room, _, module = self.where.partition(".")
        if room == "scripts":  # a folder beside segm, in a wheel too, and no package
            sys.path.insert(0, str(Path(segm.__file__).parents[1] / room))
        else:
            module = f"{segm.__name__}.{module}"
        return import_module(module).main.make_context(*args, **kwargs)


PUBLIC = ("ade20k", "camvid", "cityscapes", "coco_stuff", "pascal_context", "rumexweeds", "suim")
PREPARE = click.Group(
    "prepare",
    [LazyCommand(name, f"scripts.prepare_{name}", f"Prepare {name}.") for name in PUBLIC],
    help="Download a public data set and lay it out for training.",
)
COMMANDS: dict[str, list[click.Command]] = {
    "Train and score": [
        PREPARE,
        LazyCommand("check", "scripts.check_dataset", "Look for mistakes in a data set before a training."),
        LazyCommand("train", "segm.train", "Train a Segmenter, plain or with a merging method."),
        LazyCommand("test", "segm.test", "Score a run on its validation images."),
        LazyCommand("miou", "segm.eval.miou", "Score a run per class, also at several scales; save label maps."),
        LazyCommand("predict", "segm.inference", "Label photographs or a video."),
    ],
    "Choose": [
        LazyCommand("compare", "segm.compare", "Compare methods on any ViT and photographs without labels."),
        LazyCommand("tune", "segm.tune", "Find settings that are as good but faster on this machine."),
        LazyCommand("threshold", "segm.auto_threshold", "Derive a threshold from the similarities of tokens."),
    ],
    "Measure": [
        LazyCommand("speed", "segm.speedtest", "Measure images/s."),
        LazyCommand("flops", "segm.flops", "Count operations: GFLOPs per image."),
        LazyCommand("tokens", "segm.token_stats", "Count the tokens that are left, and what each stands for."),
        LazyCommand("similarity", "segm.similarity", "Compare tokens of one class and of different classes."),
        LazyCommand("profile", "segm.profile_model", "Time the operators, and the share of merging."),
    ],
    "Look": [
        LazyCommand("show", "segm.show_attn_map", "Draw attention, merged tokens and labels of a photograph."),
        LazyCommand("report", "segm.report", "Compare runs on one web page, with pictures."),
    ],
    "Ship": [
        LazyCommand("export", "segm.export_onnx", "Write a run as an ONNX file."),
        LazyCommand("convert", "scripts.convert_checkpoint", "Convert checkpoints from and to mmsegmentation."),
    ],
}


class Sections(click.Group):
    """Commands below headings; one that does not exist ends in one line."""

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for heading, commands in COMMANDS.items():
            with formatter.section(heading):
                formatter.write_dl([(one.name or "", one.get_short_help_str(limit=100)) for one in commands])

    def resolve_command(self, ctx: click.Context, args: list[str]) -> Any:
        if args[0] not in self.commands and not ctx.resilient_parsing:
            raise click.UsageError(f"no command {args[0]}: choose from {', '.join(self.commands)}")
        return super().resolve_command(ctx, args)


main = Sections(
    "g2tm",
    [one for commands in COMMANDS.values() for one in commands],
    help="Token reduction in plain-ViT semantic segmentation. COMMAND --help explains a command.",
    epilog='\b\nShell completion, here for bash:\n  eval "$(_G2TM_COMPLETE=bash_source g2tm)"',
)
click.version_option(package_name="g2tm", prog_name="g2tm")(main)

if __name__ == "__main__":
    main()
