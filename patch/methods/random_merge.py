"""The random baseline: as many tokens as a method leaves, but any."""

from dataclasses import replace

import g2tm
from patch.method import Option, Step, register
from patch.methods.common import COUNT, REPRESENTATIVE, TOKENS, check_tokens, grouping, tokens_left


@grouping
def _merge(step: Step) -> g2tm.Grouping:
    n_tokens, left = step.x.shape[1], tokens_left(step)
    seed = step.options["seed"] * (step.depth + 1) + step.layer
    tokens = n_tokens if left is None else min(left, n_tokens)
    return g2tm.random_merge(step.x, tokens=tokens, seed=seed, sizes=step.sizes)


register(
    "random",
    _merge,
    summary="Baseline: random tokens merge, down to a budget.",
    check=check_tokens,
    layers=(2,),
    tokens=replace(TOKENS, default=0.5),
    seed=Option(0, "Seed of the choice of tokens.", type=COUNT, flag="--merge-seed", key="merge_seed"),
    representative=REPRESENTATIVE,
    static=True,
)
