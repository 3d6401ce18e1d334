"""Tensors where they lie: names, shapes and dtypes at once, the numbers when they are asked for.

One file, several shards or a part of a large checkpoint all look the same: a mapping of names to tensors that
a conversion may walk through without ever holding a network in memory.
"""

import json
import math
import mmap
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_audio.convert.pickles import read_pickle
from ldm_audio.convert.rules import few
from ldm_audio.errors import InputError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
SAFETENSORS_NAMES = {dtype: name for name, dtype in DTYPES.items()}

# What diffusers and transformers call a network's file: a stem, perhaps a variant such as fp16, an ending.
WEIGHTS_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.(?P<variant>\w+))?\.(?P<ending>safetensors|bin)"
)
INDEX_FILE = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)\.(?P<ending>safetensors|bin)\.index"
    r"(?:\.(?P<variant>\w+))?\.json"
)


@dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Tensors(Mapping[str, Tensor]):
    """name -> tensor, each read when it is looked up."""

    def __init__(self, entries: Mapping[str, Stored]):
        self.entries = dict(entries)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Self:
        """Tensors that are at hand already, or mapped from a file, or on the meta device."""
        return cls(
            {
                name: Stored(tuple(tensor.shape), tensor.dtype, partial(state.__getitem__, name))
                for name, tensor in state.items()
            }
        )

    def __getitem__(self, name: str) -> Tensor:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: stored.shape for name, stored in self.entries.items()}

    @property
    def dtypes(self) -> set[torch.dtype]:
        """Of the floating-point tensors."""
        return {stored.dtype for stored in self.entries.values() if stored.dtype.is_floating_point}

    def on_meta(self) -> "Tensors":
        """The same without their numbers."""
        return Tensors.of(
            {n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in self.entries.items()}
        )

    def below(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, without it."""
        found = {n.removeprefix(prefix): s for n, s in self.entries.items() if n.startswith(prefix)}
        return Tensors(found)

    def without(self, *prefixes: str) -> "Tensors":
        """Those whose names begin with none of `prefixes`."""
        return Tensors({n: s for n, s in self.entries.items() if not n.startswith(prefixes)})

    def chosen(self, names: Mapping[str, str]) -> "Tensors":
        """The tensors `names[new]`, each under the name `new`."""
        return Tensors({new: self.entries[old] for new, old in names.items()})


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; InputError, naming the file, for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not a readable JSON file ({error})") from error
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


def open_safetensors(path: Path) -> tuple[dict[str, str], Tensors]:
    """Header and tensors of a safetensors file; InputError if it is damaged."""
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    try:
        safe_open(path, framework="pt")  # finds out what is damaged
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: not a readable safetensors file ({error})") from error
    metadata, entries = header.pop("__metadata__", None), {}
    for name, described in header.items():
        kind, shape = described["dtype"], tuple(described["shape"])
        if kind not in DTYPES:
            raise InputError(f"{path}: {name} is of type {kind}, which is not supported")
        start = 8 + size + described["data_offsets"][0]
        entries[name] = Stored(shape, DTYPES[kind], partial(mapped, path, start, shape, DTYPES[kind]))
    return metadata or {}, Tensors(entries)


def mapped(path: Path, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The tensor at byte `start` of a file, in pages of its own.

    What is never looked at never enters memory, and what is dropped leaves it at once: pages of a file that
    is mapped as a whole stay until the last of its tensors goes.
    """
    count = math.prod(shape)
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    first = start - start % mmap.ALLOCATIONGRANULARITY
    size = start - first + count * dtype.itemsize
    with path.open("rb") as file:
        pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY, offset=first)
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start - first).view(shape)


def state_dict(path: Path, content: object) -> Tensors:
    """The tensors of an opened torch file, which may lie below `state_dict`; other values beside are left."""
    if isinstance(content, Tensors):
        return content
    if isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        content = content["state_dict"]
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expected a state dict, found {type(content).__name__}")
    odd = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if odd or not content:
        raise InputError(f"{path}: not a state dict ({few(odd) + ': no tensors' if odd else 'it is empty'})")
    return Tensors.of(content)


def open_file(path: Path) -> Tensors:
    """The tensors of a safetensors or torch file."""
    if path.suffix == ".safetensors":
        return open_safetensors(path)[1]
    return state_dict(path, read_pickle(path))


def open_folder(folder: Path) -> tuple[Tensors, str]:
    """The tensors of a network's folder as diffusers or transformers write it, and what was chosen.

    Safetensors before pickles, one file before shards, a plain file before a variant.

    Raises:
        InputError: no weights, several variants and no plain file, or an index that leads out of the folder.
    """
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        for pattern, is_index in ((WEIGHTS_FILE, False), (INDEX_FILE, True)):
            if match := pattern.fullmatch(path.name):
                found.append((match["variant"] or "", match["ending"] != "safetensors", is_index, path))
    if not found:
        raise InputError(f"{folder}: holds no weights (model.safetensors, pytorch_model.bin or the like)")
    variants = {variant for variant, *_ in found}
    if "" not in variants and len(variants) > 1:
        raise InputError(f"{folder}: holds only the variants {few(sorted(variants))}; leave one of them")
    _, _, is_index, path = min(found)
    return (open_shards(path) if is_index else open_file(path)), path.name


def open_shards(index: Path) -> Tensors:
    """The tensors of all files that an index names; each must be there, and hold what it is said to hold."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise InputError(f"{index}: has no weight_map of names to files")
    entries: dict[str, Stored] = {}
    for file in sorted(set(weight_map.values())):
        if Path(file).name != file or file == ".." or "\\" in file:
            raise InputError(f"{index}: names {file!r}, which is not a file beside it")
        shard = open_file(index.parent / file)
        said = {name for name, where in weight_map.items() if where == file}
        if odd := sorted(said ^ set(shard)):
            raise InputError(f"{index.parent / file}: holds other tensors than {index.name} says: {few(odd)}")
        entries |= shard.entries
    return Tensors(entries)


def write_safetensors(
    path: Path,
    expected: Mapping[str, Tensor],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    header: Mapping[str, str],
) -> None:
    """Writes tensors one at a time as they come; `expected` (meta tensors) tells names, shapes and dtypes.

    `tensors` must give every name once and in the shape expected; they are converted to the dtype expected.
    """
    offset, layout = 0, {"__metadata__": dict(header)}
    for name, tensor in expected.items():
        end = offset + tensor.numel() * tensor.element_size()
        layout[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(layout, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(start + offset)
        for name, tensor in tensors:
            file.seek(start + layout[name]["data_offsets"][0])
            tensor = tensor.detach().to("cpu", expected[name].dtype).contiguous()
            file.write(tensor.reshape(-1).view(torch.uint8).numpy())
