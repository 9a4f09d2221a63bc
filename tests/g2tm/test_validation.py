"""Budgets."""

import numpy as np
import pytest

from g2tm import budget


def test_a_budget_is_a_number_or_a_share():
    for tokens, expected in ((1, 1), (100, 100), (np.int64(7), 7), (0.5, 50), (1.0, 100), (0.001, 1), (0.684, 68)):
        assert budget(tokens, 100) == expected and type(budget(tokens, 100)) is int


def test_other_budgets_are_refused():
    for tokens in (0, -1, 101, 0.0, 1.5, -0.5, True, None, "50", float("nan"), (5,)):
        with pytest.raises(ValueError, match="from 1 to 100 or a share"):
            budget(tokens, 100)
