"""What is in a file, in words: for `ldm-audio inspect`."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from math import prod

from torch import Tensor

from ldm_audio.convert.parts import Part, Source
from ldm_audio.convert.rules import few, plan
from ldm_audio.convert.stored import Tensors
from ldm_audio.errors import InputError

Expected = Callable[[Part], Mapping[str, Tensor]]


def describe_source(source: Source, expected: Expected, *, rules: bool) -> list[str]:
    """The kind of a source and each of its networks; `expected` builds a part's state on the meta device."""
    lines = [f"kind: {source.kind}"]
    lines += [f"taken: {note}" for note in source.notes]
    lines += [f"caution: {caution}" for caution in source.cautions]
    for key, value in (source.system or {}).items():
        lines.append(f"{key}: {json.dumps(value)}")
    lines.append(f"tokenizer: {source.tokenizer or 'none, give one by tokenizer='}")
    for name, part in source.parts.items():
        lines += ["", f"{name}: {describe_tensors(part.tensors)}"]
        try:
            state = expected(part)
            lines += [f"  becomes {part.recipe['_target_']}: {size(state.values())}"]
            part.check(state)
            lines += ["  every tensor fits"]
        except InputError as error:
            lines += [f"  does not fit: {error}"]
        lines += [f"  config: {json.dumps(part.recipe)}"]
        lines += [f"  {line}" for line in describe_rules(part, every=rules)]
    return lines


def describe_rules(part: Part, *, every: bool) -> list[str]:
    """How many tensors the table takes and drops; with `every`, how many each of its rules takes."""
    try:
        matches = plan(part.rules, part.tensors, None, origin=part.origin)
    except InputError as error:
        return [f"rules: {error}"]
    dropped = [name for match in matches if not match.targets for name in match.sources]
    counts = Counter(str(match.rule) for match in matches)
    lines = [f"rules: {len(counts)} of {len(part.rules)} match"]
    lines += [f"dropped: {len(dropped)} tensors ({few(dropped)})"] if dropped else []
    lines += [f"{count:5d} x {rule}" for rule, count in counts.items()] if every else []
    return lines


def describe_own(header: Mapping[str, str], tensors: Tensors) -> list[str]:
    """A network file of ours."""
    kind, told = header["format"], {key: value for key, value in header.items() if key != "format"}
    return [f"kind: {kind}, {describe_tensors(tensors)}", *(f"{key}: {value}" for key, value in told.items())]


def describe_names(tensors: Tensors) -> list[str]:
    """The tensors of a file of no known kind, grouped by the first two parts of their names."""
    groups: dict[str, list[str]] = {}
    for name in tensors:
        groups.setdefault(".".join(name.split(".")[:2]), []).append(name)
    lines = [f"tensors: {describe_tensors(tensors)}"]
    for prefix, names in sorted(groups.items(), key=lambda group: -len(group[1]))[:20]:
        first = names[0]
        lines.append(f"  {prefix}: {len(names)}, such as {first} {list(tensors.shapes[first])}")
    return lines


def describe_tensors(tensors: Tensors) -> str:
    dtypes = sorted(str(dtype).removeprefix("torch.") for dtype in tensors.dtypes)
    total = sum(prod(shape) for shape in tensors.shapes.values())
    return f"{len(tensors)} tensors, {total:,} numbers, {' and '.join(dtypes) or 'none floating'}"


def size(tensors: Iterable[Tensor]) -> str:
    tensors = list(tensors)
    return f"{len(tensors)} tensors, {sum(t.numel() for t in tensors if t.is_floating_point()):,} numbers"
