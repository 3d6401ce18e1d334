"""How much of what a prompt asks for is in the sound: accuracy by attribute, without a learned judge.

A clip's attributes are a flat dict such as {"kind": "sound", "register": "low", ...}; what a prompt expects
and what was measured are compared key by key, and a key that was not measured counts as wrong. `fits(wanted,
heard)` says what counts as right, for numbers may be right nearby; heard is None where nothing was measured.
"""

import operator
from collections.abc import Callable, Mapping, Sequence

Attributes = Mapping[str, str]
Fits = Callable[[str, str | None], bool]


def accuracy(
    expected: Sequence[Attributes], measured: Sequence[Attributes], fits: Fits = operator.eq
) -> dict[str, float]:
    """Share of right values by attribute, and of all of them under "overall"."""
    pairs = list(zip(expected, measured, strict=True))
    return shares(
        [(name, fits(value, found.get(name))) for want, found in pairs for name, value in want.items()]
    )


def shuffled_accuracy(
    expected: Sequence[Attributes], measured: Sequence[Attributes], fits: Fits = operator.eq
) -> dict[str, float]:
    """`accuracy` if each clip is held against every other clip's prompt: what a deaf model would reach."""
    return shares(
        [
            (name, fits(value, found.get(name)))
            for i, want in enumerate(expected)
            for j, found in enumerate(measured)
            if i != j
            for name, value in want.items()
        ]
    )


def chance(
    expected: Sequence[Attributes], values: Mapping[str, Sequence[str]], fits: Fits = operator.eq
) -> dict[str, float]:
    """What guessing evenly among the `values` of each attribute reaches, weighted as the prompts are."""
    wanted = [(name, value) for want in expected for name, value in want.items()]
    return shares(
        [(name, sum(fits(value, v) for v in values[name]) / len(values[name])) for name, value in wanted]
    )


def shares(outcomes: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Mean (share of True) by name, in order of appearance, and over everything under "overall"."""
    by_name: dict[str, list[float]] = {}
    for name, right in outcomes:
        by_name.setdefault(name, []).append(right)
    everything = [right for rights in by_name.values() for right in rights]
    by_name["overall"] = everything
    return {name: sum(rights) / len(rights) for name, rights in by_name.items()}
