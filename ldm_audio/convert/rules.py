"""The conversion engine: a conversion is a table of rules that must account for every tensor.

A rule turns the tensors of one or more source names into those of one or more target names:

    Rule("ups.{i}.{kind:weight|bias}", "upsampler.{i}.{kind}")
    Rule(("attn.q.weight", "attn.k.weight", "attn.v.weight"), "attn.qkv.weight", cat_rows, split_rows(3))
    drop("{path:*}.num_batches_tracked")

Names may hold placeholders: `{i}` stands for a number, `{kind:weight|bias}` for one of the words, `{path:*}`
for any text. What a placeholder may be is said once; all names of a rule hold the same ones.

Rules apply in order and the first full match wins: a rule takes a source name only together with all the
others it needs, and names taken by an earlier rule are gone. Nothing is left over in silence: a name without
a rule, a rule without a name, two tensors for one target, an unknown or unfilled target and a wrong shape are
each an error that says which. Names are settled before the first tensor is touched; tensors are then read,
turned and handed on one rule at a time, so that a lazy mapping of a large file is never in memory as a whole.
Tensors on the meta device convert as well.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ldm_audio.errors import InputError

Transform = Callable[..., Tensor | tuple[Tensor, ...]]

PLACEHOLDER = re.compile(r"\{(\w+)(?::([^{}]+))?\}")


@dataclass(frozen=True)
class Rule:
    """Sources become targets by `forward`, and targets become sources again by `inverse`.

    Args:
        sources: one name or several; none for a rule that makes its targets from nothing, once.
        targets: one name or several; none for a rule that drops its sources.
        forward: takes the source tensors in order, returns the target tensor or the tuple of them.
            None: the tensors themselves, one target for each source.
        inverse: the same the other way round; of a rule that drops, makes the sources from nothing. None: the
            tensors themselves where `forward` is None too; otherwise, and where the rule drops, it plays no
            part in an export.
        optional: may match nothing. A rule without targets always may.
    """

    sources: str | tuple[str, ...]
    targets: str | tuple[str, ...]
    forward: Transform | None = None
    inverse: Transform | None = None
    optional: bool = False

    def __post_init__(self):
        for side in ("sources", "targets"):
            names = getattr(self, side)
            object.__setattr__(self, side, (names,) if isinstance(names, str) else tuple(names))
        if self.targets and self.forward is None and len(self.sources) != len(self.targets):
            raise ValueError(f"{self}: needs a forward, there is not one target for each source")

        found = [PLACEHOLDER.findall(name) for name in self.sources + self.targets]
        held = {frozenset(placeholder for placeholder, _ in name) for name in found}
        if len(held) > 1 or (not self.sources and any(held)):
            raise ValueError(f"{self}: its names must all hold the same placeholders")

        # Let every name say what its placeholders may be, so that any of them can be searched for and the
        # rule can be turned round.
        said = {placeholder: f":{spec}" for name in found for placeholder, spec in name if spec}
        for side in ("sources", "targets"):
            names = (
                PLACEHOLDER.sub(lambda match: f"{{{match[1]}{said.get(match[1], '')}}}", name)
                for name in getattr(self, side)
            )
            object.__setattr__(self, side, tuple(names))

    def __str__(self) -> str:
        return f"{' + '.join(self.sources) or 'nothing'} -> {' + '.join(self.targets) or 'dropped'}"

    def inverted(self) -> "Rule | None":
        """The rule of the way back, or None where there is none."""
        if not self.sources:
            return Rule(self.targets, ())
        if self.inverse is None and (self.forward is not None or not self.targets):
            return None
        return Rule(self.targets, self.sources, self.inverse, self.forward, self.optional)


def drop(*sources: str) -> list[Rule]:
    """Rules that drop each of `sources`, present or not."""
    return [Rule(source, ()) for source in sources]


def prefixed(rules: Iterable[Rule], *, source: str = "", target: str = "") -> list[Rule]:
    """The same rules for names that begin with `source` on one side and `target` on the other."""
    return [
        replace(
            rule,
            sources=tuple(source + name for name in rule.sources),
            targets=tuple(target + name for name in rule.targets),
        )
        for rule in rules
    ]


def shapes_of(module: nn.Module) -> dict[str, torch.Size]:
    """What a conversion must fill: name -> shape of every tensor in the module's state dict."""
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def apply_rules(
    rules: Sequence[Rule],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]] | None,
    *,
    origin: str = "weights",
) -> dict[str, Tensor]:
    """The converted state: exactly the names and shapes of `shapes` (any, where it is None).

    Args:
        rules: the table.
        state: source name -> tensor; read once a tensor, may load them on demand.
        shapes: target name -> shape, see `shapes_of`.
        origin: what the tensors come from, a path say, for messages.

    Raises:
        InputError: `state` and the table, or the table and `shapes`, do not fit; names the tensors concerned.
    """
    return dict(iter_rules(rules, state, shapes, origin=origin))


def invert_rules(
    rules: Sequence[Rule],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]] | None = None,
    *,
    origin: str = "weights",
) -> dict[str, Tensor]:
    """The way back, for export: `apply_rules` with every rule that has an inverse turned round, in order."""
    inverted = [rule.inverted() for rule in rules]
    return apply_rules([rule for rule in inverted if rule], state, shapes, origin=origin)


def iter_rules(
    rules: Sequence[Rule],
    state: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]] | None,
    *,
    origin: str = "weights",
) -> Iterator[tuple[str, Tensor]]:
    """`apply_rules` one (name, tensor) at a time; nothing is kept, so a consumer may write and forget."""
    misshapen = []
    for match in plan(rules, state, shapes, origin=origin):
        if not match.targets:
            continue
        results = match.convert([state[name] for name in match.sources], origin)
        for name, tensor in zip(match.targets, results, strict=True):
            if shapes is None or tuple(tensor.shape) == tuple(shapes[name]):
                yield name, tensor
            else:
                sources = " + ".join(match.sources) or "a constant"
                misshapen.append(f"{name} {list(tensor.shape)} from {sources}, expected {list(shapes[name])}")
    if misshapen:
        raise InputError(f"{origin}: wrong shape: {few(misshapen)}")


@dataclass(frozen=True)
class Match:
    """One rule with its placeholders filled in."""

    rule: Rule
    sources: tuple[str, ...]
    targets: tuple[str, ...]

    def convert(self, tensors: Sequence[Tensor], origin: str) -> Sequence[Tensor]:
        if self.rule.forward is None:
            return tensors
        try:
            results = self.rule.forward(*tensors)
        except (RuntimeError, ValueError, IndexError) as error:
            reason = str(error).splitlines()[0]
            raise InputError(f"{origin}: cannot convert {' + '.join(self.sources)}: {reason}") from error
        results = (results,) if isinstance(results, Tensor) else results
        if len(results) != len(self.targets):
            raise ValueError(f"{self.rule}: forward gave {len(results)} tensors")
        return results


def plan(
    rules: Sequence[Rule],
    names: Iterable[str],
    shapes: Mapping[str, Sequence[int]] | None,
    *,
    origin: str = "weights",
) -> list[Match]:
    """Settles which rule takes which names, in table order, from the names alone; InputError as above."""
    free = dict.fromkeys(names)  # an ordered set
    matches: list[Match] = []
    problems: list[str] = []
    idle: list[str] = []
    for rule in rules:
        found = list(_matches(rule, free))
        matches += found
        if not (found or rule.optional or not rule.targets):
            idle.append(str(rule))

    origins: dict[str, list[str]] = {}
    for match in matches:
        for target in match.targets:
            origins.setdefault(target, []).append(" + ".join(match.sources) or "a constant")
    doubled = [
        f"{target} from {' and from '.join(given)}" for target, given in origins.items() if len(given) > 1
    ]
    problems += [f"no rule takes {few(free, lambda name: _with_partners(rules, name))}"] if free else []
    problems += [f"nothing matches the rule {few(idle)}"] if idle else []
    problems += [f"more than one tensor for {few(doubled)}"] if doubled else []
    if shapes is not None:
        unknown = [target for target in origins if target not in shapes]
        missing = [target for target in shapes if target not in origins]
        problems += [f"the network has no {few(unknown)}"] if unknown else []
        problems += [f"nothing fills {few(missing)}"] if missing else []
    if problems:
        raise InputError(f"{origin}: " + "; ".join(problems))
    return matches


def _matches(rule: Rule, free: dict[str, None]) -> Iterator[Match]:
    """Every full match of `rule` among the free names, which it takes."""
    if not any(PLACEHOLDER.search(template) for template in rule.sources):
        candidates = [{}]  # nothing to fill in, so no search over the names
    else:
        pattern = _pattern(rule.sources[0])
        candidates = [found.groupdict() for name in free if (found := pattern.fullmatch(name))]
    for values in candidates:
        sources = tuple(_fill(template, values) for template in rule.sources)
        if all(name in free for name in sources):
            for name in sources:
                del free[name]
            yield Match(rule, sources, tuple(_fill(template, values) for template in rule.targets))


def _with_partners(rules: Sequence[Rule], name: str) -> str:
    """`name`, with the names that it lacks where a rule would take it together with others."""
    for rule in rules:
        for template in rule.sources if len(rule.sources) > 1 else ():
            if found := _pattern(template).fullmatch(name):
                needed = [_fill(source, found.groupdict()) for source in rule.sources]
                return f"{name} (not without {', '.join(other for other in needed if other != name)})"
    return name


def _pattern(template: str) -> re.Pattern:
    parts, end, seen = [], 0, set()
    for placeholder in PLACEHOLDER.finditer(template):
        parts.append(re.escape(template[end : placeholder.start()]))
        name, spec = placeholder.groups()
        if name in seen:
            parts.append(f"(?P={name})")
        elif spec is None:
            parts.append(rf"(?P<{name}>\d+)")
        elif spec == "*":
            parts.append(f"(?P<{name}>.+)")
        else:
            parts.append(f"(?P<{name}>{'|'.join(map(re.escape, spec.split('|')))})")
        seen.add(name)
        end = placeholder.end()
    return re.compile("".join(parts) + re.escape(template[end:]))


def _fill(template: str, values: Mapping[str, str]) -> str:
    return PLACEHOLDER.sub(lambda placeholder: values[placeholder[1]], template)


def few(items: Iterable[str], describe: Callable[[str], str] = str) -> str:
    """The first five items and how many more there are."""
    items = list(items)
    more = f" and {len(items) - 5} more" if len(items) > 5 else ""
    return ", ".join(describe(item) for item in items[:5]) + more


def cat_rows(*tensors: Tensor) -> Tensor:
    """Several tensors one below the other: query, key and value into one."""
    check_same_dtype(*tensors)
    return torch.cat(tensors)


def check_same_dtype(*tensors: Tensor) -> None:
    """ValueError where torch would join numbers of different kinds in silence."""
    if len({tensor.dtype for tensor in tensors}) > 1:
        raise ValueError(f"dtypes {', '.join(str(tensor.dtype) for tensor in tensors)} differ")


def split_rows(parts: int) -> Transform:
    """The inverse of `cat_rows` for `parts` tensors of equal size; they own their memory, as files need."""

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        if tensor.ndim == 0 or tensor.shape[0] % parts:
            raise ValueError(f"shape {list(tensor.shape)} does not split into {parts}")
        return tuple(part.clone() for part in tensor.chunk(parts))

    return split


def fold_weight_norm(norm: Tensor, direction: Tensor) -> Tensor:
    """weight_g and weight_v -> weight: each slice along the first axis, scaled to its norm."""
    check_same_dtype(norm, direction)
    axes = tuple(range(1, direction.ndim))
    return direction * (norm / torch.linalg.vector_norm(direction, dim=axes, keepdim=True))
