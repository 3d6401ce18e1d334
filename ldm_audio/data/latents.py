"""Clips encoded once: VAE latents, CLAP embeddings and captions in safetensors shards.

A shard holds one stacked tensor a kind (`z_mean`, `z_std` (i, c, t, f), `audio_embed` (i, d)); its header
holds the captions and the hashes of the networks that made it. `ldm-audio encode` writes them.
"""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_audio.data.loader import ItemKey
from ldm_audio.errors import InputError

TENSORS = ("z_mean", "z_std", "audio_embed")


class Latents:
    """The encoded clips of a folder; items hold `z_mean`, `z_std` (c, t, f), `audio_embed` (d,), `caption`.

    Raises InputError for a folder without shards, with damaged ones, or with shards of different encoders.
    """

    def __init__(self, *, path: str):
        paths = sorted(Path(path).glob("shard_*.safetensors"))
        if not paths:
            raise InputError(f"{path}: no shard_*.safetensors; make them with `ldm-audio encode out={path}`")
        self.tensors: list[dict] = []
        self.places: list[tuple[int, int]] = []
        self._captions: list[str] = []
        made_by = set()
        for number, shard in enumerate(paths):
            header, tensors = read_shard(shard)
            self.tensors.append(tensors)
            made_by.add(header["encoders"])
            captions = json.loads(header["captions"])
            self.places += [(number, row) for row in range(len(captions))]
            self._captions += captions
        if len(made_by) > 1:
            raise InputError(
                f"{path}: its shards were made by different encoders; encode into an empty folder"
            )
        self.encoders: dict[str, str] = json.loads(made_by.pop())

    def __len__(self) -> int:
        return len(self.places)

    def captions(self) -> list[str]:
        """The caption of every clip."""
        return list(self._captions)

    def __getitem__(self, key: ItemKey | int) -> dict:
        index = key if isinstance(key, int) else key.index
        shard, row = self.places[index]
        return {name: self.tensors[shard][name][row] for name in TENSORS} | {"caption": self._captions[index]}


def read_shard(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Header and tensors of a shard; InputError if it is damaged or something else."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in TENSORS}
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable shard of latents ({error})") from error
    if not {"captions", "encoders"} <= header.keys():
        raise InputError(
            f"{path}: its header has no captions and encoders; `ldm-audio encode` did not write it"
        )
    return header, tensors
