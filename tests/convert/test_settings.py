"""Foreign settings: every value is checked, nothing that fits is refused, names go there and back."""

import pytest

from ldm_audio.convert import clap, clvp, diffusers, hifigan
from ldm_audio.convert.settings import (
    COUNT,
    FLAG,
    INDEX,
    NOTHING,
    NUMBER,
    REQUIRED,
    UNIFORM,
    Setting,
    either,
    fixed,
    one_of,
    only,
    read_settings,
    several,
    single,
    to_ours,
    to_theirs,
)
from ldm_audio.errors import InputError

TABLES = {
    "unet": diffusers.UNET_SETTINGS,
    "vae": diffusers.VAE_SETTINGS,
    "schedule": diffusers.SCHEDULE_SETTINGS,
    "text": clap.TEXT_SETTINGS,
    "roberta": clap.ROBERTA_SETTINGS,
    "audio": clap.AUDIO_SETTINGS,
    "front end": clap.FRONT_END_SETTINGS,
    "vocoder": hifigan.SPEECHT5_SETTINGS,
    "generator": hifigan.GENERATOR_SETTINGS,
    "clvp tower": clvp.TOWER_SETTINGS,
    "clvp text": clvp.TEXT_SETTINGS,
    "clvp decoder": clvp.DECODER_SETTINGS,
    "clvp front end": clvp.PREPROCESSOR_SETTINGS,
}


@pytest.mark.parametrize(
    "kind, fit, unfit",
    [
        (COUNT, [1, 50265], [0, -1, True, 2.0, "3", None, [1], {}]),
        (INDEX, [0, 1], [-1, False, None]),
        (NUMBER, [0, -1, 0.5], [True, None, "0.5", float("nan"), float("inf"), [0.5]]),
        (FLAG, [True, False], [0, 1, None, "true"]),
        (several(COUNT), [[1], [3, 5]], [[], 3, [0], [1, None], {"a": 1}, "12"]),
        (several(several(COUNT)), [[[1, 3], [1]]], [[1], [[]], []]),
        (UNIFORM, [4, [4], [4, 4]], [[4, 2], [], 0, [True]]),
        (either(COUNT, NOTHING), [3, None], ["x", -3, [3]]),
        (one_of(["a", "b"]), ["a", "b"], ["c", "", None, ["a"]]),
        (only("gelu"), ["gelu"], ["relu", None, ""]),
        (only(None), [None, False, 0, []], [1, "x", True]),
        (only(1.0), [1, 1.0], [2, None, "1"]),
    ],
)
def test_a_kind_fits_what_it_says(kind, fit, unfit):
    assert all(kind.fits(value) for value in fit)
    assert not any(kind.fits(value) for value in unfit)


@pytest.mark.parametrize("name", TABLES)
def test_every_default_is_a_value_that_fits_or_is_refused_on_purpose(name):
    refused = {
        key for key, s in TABLES[name].items() if s.default is not REQUIRED and not s.kind.fits(s.default)
    }
    # What the peer assumes and ours has not: two token types, a vocoder that normalises its input.
    assert refused == {"roberta": {"type_vocab_size"}, "vocoder": {"normalize_before"}}.get(name, set())


def test_absent_keys_take_their_default_and_unknown_keys_are_not_looked_at():
    table = {"a": Setting(COUNT, 3, "width"), "b": Setting(FLAG, True), **fixed({"act": "silu"})}
    values = read_settings({"a": 5, "other": object()}, table)
    assert values == {"a": 5, "b": True, "act": "silu"}
    assert to_ours(table, values) == {"width": 5}
    assert to_theirs(table, {"width": 7, "depth": 2}) == {"a": 7}


@pytest.mark.parametrize(
    "config, told",
    [
        ({}, r"^lacks in\.a, in\.b$"),
        ({"a": 1, "b": None}, r"^in\.b=None: expected a number$"),
        ({"a": [1], "b": 1}, r"^in\.a=\[1\]: expected a whole number above 0 or None$"),
        ([1, 2], r"^in=\[1, 2\]: expected a mapping$"),
    ],
)
def test_what_does_not_fit_is_named(config, told):
    table = {"a": Setting(either(COUNT, NOTHING), REQUIRED), "b": Setting(NUMBER, REQUIRED)}
    with pytest.raises(InputError, match=told):
        read_settings(config, table, within="in.")


def test_a_uniform_value_is_one_number():
    assert single(4) == single([4, 4]) == 4
