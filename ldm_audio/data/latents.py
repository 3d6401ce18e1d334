"""Clips encoded once: VAE latents, CLAP embeddings and captions in safetensors shards.

A shard holds one stacked tensor a kind (`z_mean`, `z_std` (i, c, t, f), `audio_embed` (i, d)); its header
holds the captions and the hashes of the networks that made it. `ldm-audio encode` writes them.
"""

import json
from pathlib import Path

from safetensors import safe_open

from ldm_audio.data.loader import ItemKey
from ldm_audio.errors import InputError

TENSORS = ("z_mean", "z_std", "audio_embed")


class Latents:
    """The encoded clips of a folder; items hold `z_mean`, `z_std` (c, t, f), `audio_embed` (d,), `caption`.

    Raises InputError for a folder without shards, or with shards of different encoders.
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
            with safe_open(shard, framework="pt") as file:
                header = file.metadata()
                self.tensors.append({name: file.get_tensor(name) for name in TENSORS})
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
