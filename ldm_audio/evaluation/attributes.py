"""How much of what a prompt asks for is in the sound: accuracy by attribute, without a learned judge.

A clip's attributes are a flat dict such as {"kind": "sound", "register": "low", ...}; what a prompt expects
and what was measured are compared key by key, and a key that was not measured counts as wrong.
"""

from collections.abc import Mapping, Sequence

Attributes = Mapping[str, str]


def accuracy(expected: Sequence[Attributes], measured: Sequence[Attributes]) -> dict[str, float]:
    """Share of right values by attribute, and of all of them under "overall"."""
    pairs = list(zip(expected, measured, strict=True))
    return shares([(name, found.get(name) == value) for want, found in pairs for name, value in want.items()])


def shuffled_accuracy(expected: Sequence[Attributes], measured: Sequence[Attributes]) -> dict[str, float]:
    """`accuracy` if each clip is held against every other clip's prompt: what a deaf model would reach."""
    return shares(
        [
            (name, found.get(name) == value)
            for i, want in enumerate(expected)
            for j, found in enumerate(measured)
            if i != j
            for name, value in want.items()
        ]
    )


def chance(expected: Sequence[Attributes], num_values: Mapping[str, int]) -> dict[str, float]:
    """What guessing evenly among the values of each attribute reaches, weighted as the prompts are."""
    names = [name for want in expected for name in want]
    by_name = {name: 1 / num_values[name] for name in dict.fromkeys(names)}
    return by_name | {"overall": sum(by_name[name] for name in names) / len(names)}


def shares(outcomes: Sequence[tuple[str, bool]]) -> dict[str, float]:
    """Share of True by name, in order of appearance, and over everything under "overall"."""
    by_name: dict[str, list[bool]] = {}
    for name, right in outcomes:
        by_name.setdefault(name, []).append(right)
    everything = [right for rights in by_name.values() for right in rights]
    by_name["overall"] = everything
    return {name: sum(rights) / len(rights) for name, rights in by_name.items()}
