"""Sizes of a network read off the names and shapes of its tensors, where a file has no config."""

import re
from collections.abc import Iterable, Mapping

from ldm_audio.errors import InputError

Shapes = Mapping[str, tuple[int, ...]]


def shape_of(shapes: Shapes, name: str) -> tuple[int, ...]:
    """The shape of `name`; InputError where there is no such tensor."""
    if name not in shapes:
        raise InputError(f"no tensor named {name}")
    return shapes[name]


def count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the one group of `pattern` takes among the names."""
    return len({found[1] for name in names if (found := re.fullmatch(pattern, name))})
