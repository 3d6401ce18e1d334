"""Learning-rate schedules by hand."""

import math

import pytest

from ldm_audio.training.optim import constant, exponential, warmup, warmup_cosine


def test_constant_is_one():
    assert [constant(step) for step in (0, 1, 10**6)] == [1.0] * 3


def test_warmup_rises_evenly_to_one_at_its_last_step():
    assert [warmup(step, warmup_steps=4) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert warmup(0, warmup_steps=0) == 1.0


def test_warmup_cosine_rises_then_falls_along_half_a_cosine_to_its_floor():
    values = [warmup_cosine(step, warmup_steps=2, max_steps=10, floor=0.2) for step in range(13)]
    assert values[:3] == [0.5, 1.0, 1.0]
    assert values[4] == pytest.approx(0.2 + 0.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[6] == pytest.approx(0.6)  # half way
    assert values[10:] == [pytest.approx(0.2)] * 3
    assert warmup_cosine(0, warmup_steps=0, max_steps=0, floor=0.2) == 1.0


def test_exponential_falls_once_every_so_many_steps():
    assert [exponential(step, decay=0.5, every=3) for step in range(7)] == [1, 1, 1, 0.5, 0.5, 0.5, 0.25]
