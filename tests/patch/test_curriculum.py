"""The threshold curriculum."""

import pytest

from patch import Curriculum


def test_published_curriculum_of_ade20k():
    curriculum = Curriculum(0.95, 0.88, warmup=64, period=10)
    assert curriculum.epochs == 134
    assert [curriculum.threshold(e) for e in (0, 63, 64, 73, 74, 123, 124, 500)] == [
        0.95, 0.95, 0.94, 0.94, 0.93, 0.89, 0.88, 0.88]  # fmt: skip


def test_it_ends_at_a_target_between_the_steps():
    curriculum = Curriculum(0.9, 0.885, warmup=0, period=1)
    assert [curriculum.threshold(e) for e in range(3)] == [0.89, 0.885, 0.885]


@pytest.mark.parametrize("target", [0.94, 0.91, 0.888, 0.885, 0.882, 0.88])
def test_it_has_trained_with_the_target_for_a_period(target):
    curriculum = Curriculum(0.95, target, warmup=2, period=3)
    last = [curriculum.threshold(epoch) for epoch in range(curriculum.epochs)][-4:]
    assert last[0] > target and last[1:] == [target] * 3


@pytest.mark.parametrize("arguments", [(0.8, 0.9, 1, 1), (1.2, 0.9, 1, 1), (0.9, 0.8, -1, 1), (0.9, 0.8, 1, 0)])
def test_impossible_curricula_are_refused(arguments):
    with pytest.raises(ValueError, match=r"threshold|curriculum"):
        Curriculum(*arguments)
