"""One CPU generator a row, so that a draw depends on the row's own key and on nothing beside it.

Training draws from (seed, step, item), sampling from (seed, candidate): the same row gets the same
numbers on every device, in every batch and on any number of ranks.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def generator_for(*key: int) -> torch.Generator:
    """A CPU generator seeded by a hash of the integers in `key`; equal keys give equal streams."""
    digest = hashlib.blake2b(",".join(str(int(part)) for part in key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class RowRandom:
    """Independent random streams for the rows of a batch, one for each key in `keys`."""

    def __init__(self, keys: Sequence[tuple[int, ...]]):
        self.generators = [generator_for(*key) for key in keys]

    def __len__(self) -> int:
        return len(self.generators)

    def randn(self, *shape: int) -> Tensor:
        """(b, *shape) standard normal, float32, on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self.generators])

    def rand(self, *shape: int) -> Tensor:
        """(b, *shape) uniform in [0, 1), float32, on the CPU."""
        return torch.stack([torch.rand(shape, generator=g) for g in self.generators])

    def randint(self, high: int) -> Tensor:
        """(b,) integers in [0, high), int64, on the CPU."""
        return torch.cat([torch.randint(high, (1,), generator=g) for g in self.generators])
