"""Settings of foreign config files, as tables: what a value must be, what a file means without it, our name.

    UNET = {"in_channels": Setting(COUNT, 4, "in_channels"), **fixed({"act_fn": "silu"})}
    values = read_settings({"in_channels": 8}, UNET)     # {"in_channels": 8, "act_fn": "silu"}, checked
    to_ours(UNET, values), to_theirs(UNET, arguments)    # there and back, for what only changes its name

What a network is built from is checked here and nowhere else; a key that no table names is not looked at.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from ldm_audio.errors import InputError


@dataclass(frozen=True)
class Kind:
    """What a value may be, in words and as a test."""

    words: str
    fits: Callable[[Any], bool]


def is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


COUNT = Kind("a whole number above 0", lambda value: is_whole(value) and value > 0)
INDEX = Kind("a whole number of 0 or more", lambda value: is_whole(value) and value >= 0)
NUMBER = Kind("a number", lambda value: is_whole(value) or (isinstance(value, float) and isfinite(value)))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))


def several(kind: Kind) -> Kind:
    """A list of at least one."""
    return Kind(
        f"a list, each {kind.words}",
        lambda value: isinstance(value, list) and len(value) > 0 and all(map(kind.fits, value)),
    )


def either(*kinds: Kind) -> Kind:
    return Kind(
        " or ".join(kind.words for kind in kinds), lambda value: any(kind.fits(value) for kind in kinds)
    )


def one_of(words: Collection[str]) -> Kind:
    return Kind(" or ".join(words), lambda value: isinstance(value, str) and value in words)


def only(expected: object) -> Kind:
    """One value alone; where that means "without", None, False and 0 all do."""
    return Kind(repr(expected), lambda value: value == expected or not (value or expected))


NOTHING = only(None)
COUNT_OR_LIST = either(COUNT, several(COUNT))  # one number for every level, or one a level
UNIFORM = Kind(
    "one whole number above 0, or a list of equal ones",
    lambda value: COUNT_OR_LIST.fits(value) and (COUNT.fits(value) or len(set(value)) == 1),
)


@dataclass(frozen=True)
class Setting:
    """One key. default: what its absence means, or REQUIRED. ours: our name for the value, if it has one."""

    kind: Kind
    default: Any
    ours: str | None = None


REQUIRED = object()


def fixed(values: Mapping[str, Any]) -> dict[str, Setting]:
    """Settings that change the arithmetic, of which ours has one value alone, the default."""
    return {key: Setting(only(value), value) for key, value in values.items()}


def read_settings(
    config: Mapping[str, Any], table: Mapping[str, Setting], *, within: str = ""
) -> dict[str, Any]:
    """The value of every key of the table, checked.

    within: the key, with a dot behind it, under which `config` itself stands, for messages.

    Raises:
        InputError: `config` is no mapping, lacks a required key, or holds a value that does not fit.
    """
    if not isinstance(config, Mapping):
        raise InputError(f"{within.removesuffix('.')}={config!r}: expected a mapping")
    required = [key for key, setting in table.items() if setting.default is REQUIRED]
    if missing := [f"{within}{key}" for key in required if key not in config]:
        raise InputError(f"lacks {', '.join(missing)}")
    values = {key: config.get(key, setting.default) for key, setting in table.items()}
    for key, value in values.items():
        if not table[key].kind.fits(value):
            raise InputError(f"{within}{key}={value!r}: expected {table[key].kind.words}")
    return values


def to_ours(table: Mapping[str, Setting], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that have a name with us, under it."""
    return {setting.ours: values[key] for key, setting in table.items() if setting.ours}


def to_theirs(table: Mapping[str, Setting], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The other way round."""
    return {key: arguments[setting.ours] for key, setting in table.items() if setting.ours}


def single(value: int | list[int]) -> int:
    """The number of a `UNIFORM` value."""
    return value if isinstance(value, int) else value[0]
