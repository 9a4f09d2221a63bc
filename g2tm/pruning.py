"""Tokens that a step prunes: what they are tied to, so that every position gets something back."""

import torch.nn.functional as F
from torch import Tensor

from g2tm.selection import LOWEST, most_similar, places, precise, rows, selection


@selection
def tie_pruned(
    x: Tensor, result: Tensor, assignment: Tensor, pruned: Tensor, most: int, prefix: int, gone: Tensor | None
) -> Tensor:
    """Tie every pruned token to the patch token of the result that is most similar to it.

    It contributes nothing to that token; it only gets its features back in the end. The papers of pruning methods do
    not say what a pruned position of a dense prediction is given.

    Args:
        x: (B, L, D), the tokens before the step, prefix tokens first.
        result: (B, M, D), the tokens after it, in which pruned tokens count nothing.
        assignment: (B, L), for the tokens that are not pruned.
        pruned: (B, L), bool.
        most: the largest number of pruned tokens in an image, or more.
        prefix: number of prefix tokens, to which a token is tied only if no patch token is left in its image.
        gone: (B, M), bool, True for padding, or for masked tokens of the result; None: there are none.

    Returns:
        (B, L), the assignment with the pruned tokens tied.
    """
    if most == 0:
        return assignment
    candidates = places(pruned, most)
    result = F.normalize(precise(result), dim=-1)

    def exclude(product: Tensor, _: int) -> None:
        product[:, :, :prefix] = LOWEST
        if gone is not None:
            product.masked_fill_(gone[:, None], LOWEST)

    _, nearest = most_similar(F.normalize(precise(rows(x, candidates)), dim=-1), result, exclude)
    nearest = nearest.where(pruned.gather(1, candidates), assignment.gather(1, candidates))
    return assignment.scatter(1, candidates, nearest)
