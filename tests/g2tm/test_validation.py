"""Budgets."""

import numpy as np
import pytest
import torch

from g2tm import budget
from g2tm.validation import check_tokens


def test_a_budget_is_a_number_or_a_share():
    for tokens, expected in ((1, 1), (100, 100), (np.int64(7), 7), (0.5, 50), (1.0, 100), (0.001, 1), (0.684, 68)):
        assert budget(tokens, 100) == expected and type(budget(tokens, 100)) is int


def test_other_budgets_are_refused():
    for tokens in (0, -1, 101, 0.0, 1.5, -0.5, True, None, "50", float("nan"), (5,)):
        with pytest.raises(ValueError, match="from 1 to 100 or a share"):
            budget(tokens, 100)


def test_a_budget_goes_with_images_without_padding():
    check_tokens(3, 1, 5)
    with pytest.raises(ValueError, match="no padding"):
        check_tokens(3, 1, 5, torch.zeros(1, 5, dtype=torch.bool))
