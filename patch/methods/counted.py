"""Methods that remove a number of tokens that is given, and learn nothing."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import g2tm
from g2tm import Reduction
from patch.method import Choice, Number, Option, Place, Step, Target, register
from patch.methods.common import PAPER, SCHEDULE, VARIANT, r_here, r_of_pair


def _merge_tome(step: Step) -> Reduction:
    """ToMe: the most similar keys, a fixed number in every layer."""
    return g2tm.bipartite(step.keys, r=r_here(step), **step.sequence).without_prefix(step.prefix)


register("tome", _merge_tome, needs=["keys"], attention="proportional", **SCHEDULE)


def _merge_tofu(step: Step) -> Reduction:
    """ToFu: drops the matched tokens up to the middle of the network, merges them after it."""
    rule = {"prune": g2tm.prunes(step.layer, step.depth), "variant": step.options["variant"]}
    return g2tm.tofu(step.keys, r=r_here(step), **rule, **step.sequence).without_prefix(step.prefix)


register(
    "tofu",
    _merge_tofu,
    needs=["keys"],
    variant=replace(
        VARIANT, help="Norm of merged tokens. code: divided by the norm of the target; paper: by that of the mean."
    ),
    **SCHEDULE,
)


def _merge_dct(step: Step) -> Reduction:
    """DCT: the lowest frequencies along the sequence of patch tokens."""
    return g2tm.dct(step.x, r=r_here(step))


register("dct", _merge_dct, place="block", **SCHEDULE)


KEEP = Option(0.5, "Share of the patch tokens that each merging layer keeps.", type=Number(0, 1), flag="--keep-rate")


def _kept(step: Step) -> int:
    """The patch tokens that a share leaves."""
    return max(int(step.options["keep"] * step.x.shape[1]), 1)


def _prepare_pitome(given: dict[str, Any]) -> dict[str, Any]:
    """The paper's form counts sizes in attention, the published code does not."""
    attention = {"attention": "proportional"} if given.get("variant") == PAPER else {}
    return attention | r_of_pair(given)


def _merge_pitome(step: Step) -> Reduction:
    """PiToMe: tokens that have much in common with many merge, isolated ones stay."""
    paper = step.options["variant"] == PAPER
    rule = "bsm" if not paper and g2tm.matches_all(step.layer, step.depth) else "energy"
    given = {"margin": g2tm.energy_margin(step.layer, step.depth, paper), "variant": rule, "paper": paper}
    r = r_here(step) if step.options["keep"] is None else step.x.shape[1] - _kept(step)
    return g2tm.pitome(step.keys, r=r, **given, **step.whole).without_prefix(step.prefix)


register(
    "pitome",
    _merge_pitome,
    needs=["keys"],
    variant=replace(
        VARIANT,
        help="code: margin 0.75, half of the layers match all tokens; paper: margin 0.9, its energy everywhere, sizes "
        "count in attention.",
    ),
    keep=replace(KEEP, default=None, help="Share of the patch tokens that each layer keeps, as in the paper; not r."),
    **SCHEDULE | {"prepare": _prepare_pitome},
)


def _place_mctf(options: Mapping[str, Any]) -> Place:
    """One step ahead in the paper (section 3.3), by the attention of the layer itself in the published code."""
    return "ahead" if options["variant"] == PAPER else "attention"


def _merge_mctf(step: Step) -> Reduction:
    """MCTF: similar, little attended, small tokens fuse, in both directions."""
    options = step.options
    tau = options["tau"] or ((1, 20, 40) if options["variant"] == PAPER else (1, 0, 0))
    given = {"importance": step.means, "tau": tau, "bidirectional": options["bidirectional"]}
    return g2tm.mctf(step.input, r=r_here(step), **given, **step.whole).without_prefix(step.prefix)


register(
    "mctf",
    _merge_mctf,
    place=_place_mctf,
    needs=["input", "means"],
    attention="proportional",
    variant=replace(
        VARIANT,
        help="code: temperatures 1 0 0, attention of the layer itself; paper: 1 20 40, attention of the next layer, "
        "which is reused there.",
    ),
    tau=Option(
        None,
        "Temperatures of similarity, information and size; 0 leaves a criterion out.  [default: those of the variant]",
        type=Number(0),
        many=3,
        flag="--temperatures",
    ),
    bidirectional=Option(
        True,
        "Fuse in both directions, half of the tokens in each, or in one.",
        flag={"--bidirectional": True, "--one-direction": False},
    ),
    **SCHEDULE,
)


def _merge_crossget(step: Step) -> Reduction:
    """CrossGET, vision side: sources and destinations among all pairs."""
    return g2tm.crossget(step.keys, r=r_here(step), **step.whole).without_prefix(step.prefix)


register("crossget", _merge_crossget, needs=["keys"], attention="proportional", **SCHEDULE)


def _merge_atc(step: Step) -> Reduction:
    """ATC: agglomerative clusters of a share of the tokens."""
    left = _kept(step)
    keys = step.keys[:, step.prefix :]
    return g2tm.atc(keys, clusters=left, linkage=step.options["linkage"], sizes=step.sizes)


def _atc_layers(target: Target) -> tuple[int, ...]:
    """Before the MLP of blocks 4, 7 and 10 of 12 (ATC, section 4)."""
    return tuple(sorted({1 + target.depth * quarter // 4 for quarter in (1, 2, 3)}))


register(
    "atc",
    _merge_atc,
    needs=["keys"],
    layers=_atc_layers,
    attention="proportional",
    keep=KEEP,
    linkage=Option("average", "Distance of two clusters.", type=Choice(g2tm.LINKAGES)),
    static=True,
    traceable=False,
)
