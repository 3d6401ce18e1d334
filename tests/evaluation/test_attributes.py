"""Accuracy by attribute: what counts as right, and what guessing would reach."""

import pytest

from ldm_audio.evaluation.attributes import accuracy, chance, shuffled_accuracy

WANTED = [{"kind": "beat", "tempo": "100"}, {"kind": "sound", "motion": "level"}]
HEARD = [{"kind": "beat", "tempo": "104"}, {"kind": "sound"}]


def near(wanted, heard):
    return wanted == heard or {wanted, heard} == {"100", "104"}


def test_a_number_is_right_where_it_fits_and_what_was_not_measured_is_wrong():
    assert accuracy(WANTED, HEARD) == {"kind": 1.0, "tempo": 0.0, "motion": 0.0, "overall": 0.5}
    assert accuracy(WANTED, HEARD, near) == {"kind": 1.0, "tempo": 1.0, "motion": 0.0, "overall": 0.75}
    assert shuffled_accuracy(WANTED, HEARD, near)["overall"] == 0.0


def test_chance_is_the_share_of_values_that_fit_weighted_as_the_prompts_are():
    values = {"kind": ("beat", "sound"), "tempo": ("100", "104", "108", "112"), "motion": ("level", "rising")}
    assert chance(WANTED, values) == {"kind": 0.5, "tempo": 0.25, "motion": 0.5, "overall": 1.75 / 4}
    assert chance(WANTED, values, near)["tempo"] == pytest.approx(0.5)
