"""Clips encoded once: VAE latents, CLAP embeddings and captions in safetensors shards.

A shard holds one stacked tensor a kind: `z_mean`, `z_std` (i, c, t, f) and, where CLAP was there,
`audio_embed` (i, d), `text_embed` (captions, d). Its header holds the clips' captions and windows, and hashes
of what made it. `ldm-audio encode` writes them. Rows are read as they are asked for, so that memory does not
bound the data.

Latents of windows that begin at downbeats can be mixed (BLM): each window was encoded by itself, because a
cut of a latent is not the latent of the cut.
"""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ldm_audio.audio.mixup import Mixup, TempoGroups, mix_caption
from ldm_audio.data.loader import ItemKey
from ldm_audio.data.mixing import MIXING
from ldm_audio.errors import InputError

LATENTS = {"z_mean", "z_std"}
EMBEDS = {"audio_embed", "text_embed"}  # both or, of an encoding without CLAP, none
INDEX = "index.json"
HEADER = "encoding"
NO_DATA = "data"  # the hash that says which clips were encoded, not how


class Latents:
    """The encoded clips of a folder; items hold `z_mean`, `z_std` (c, t, f), `audio_embed`, `text_embed` (d,)
    and `caption`, one of the clip's, drawn anew in every epoch.

    mixup: with `space="latent"`, items are mixed as `data/mixing.py` describes it: an anchor's window at one
    of its track's downbeats, `partner_z_mean`, `partner_z_std`, `partner_caption` and `mix_ratio`.

    Raises InputError for a folder without shards, with too few or damaged ones, or with shards of different
    encoders, and for a mixup that cached latents cannot do.
    """

    def __init__(self, *, path: str, seed: int, mixup: Mixup | None):
        index = read_index(Path(path))
        self.seed = seed
        self.mixup = mixup if mixup is not None and mixup.prob > 0 else None
        self.paths = [Path(path) / name for name in index["shards"]]
        self.made_by: dict[str, str] = index["made_by"]
        self.places: list[tuple[int, int]] = []
        self.clips: list[dict] = []
        self.first_caption: list[int] = []  # the row of `text_embed` with a clip's first caption
        self.has_embeds = True
        for number, shard in enumerate(self.paths):
            header = read_header(shard)
            self.has_embeds &= header["tensors"] >= EMBEDS
            if header["made_by"] != self.made_by:
                raise InputError(
                    f"{path}: its shards were made by different encoders; encode into an empty folder"
                )
            clips = header["clips"]
            self.places += [(number, row) for row in range(len(clips))]
            self.clips += clips
            counts = [len(clip["captions"]) for clip in clips]
            self.first_caption += np.cumsum([0, *counts[:-1]]).tolist()
        self.files: dict[int, safe_open] = {}
        if self.mixup is not None:
            self.group(self.mixup)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"files": {}}  # another process opens its own

    @property
    def encoders(self) -> dict[str, str]:
        """Hashes of the networks and the front end that made the latents."""
        return {name: digest for name, digest in self.made_by.items() if name != NO_DATA}

    def __len__(self) -> int:
        return len(self.places)

    def captions(self) -> list[str]:
        """Every caption of every clip."""
        return [caption for clip in self.clips for caption in clip["captions"]]

    def __getitem__(self, key: ItemKey | int) -> dict:
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        if self.mixup is None:
            return self.read(index, epoch)
        rng = np.random.default_rng([self.seed, epoch, index, MIXING])
        pair = self.draw_pair(index, rng)
        anchor = self.read(index if pair is None else pair[0], epoch)
        if pair is None:
            nothing = torch.zeros_like(anchor["z_mean"])
            return anchor | {
                "partner_z_mean": nothing, "partner_z_std": nothing, "partner_caption": "",
                "mix_ratio": torch.tensor(1.0),
            }  # fmt: skip
        partner = self.read(pair[1], epoch)
        ratio = float(rng.beta(self.mixup.alpha, self.mixup.alpha))
        caption = mix_caption(self.mixup, anchor["caption"], partner["caption"], ratio)
        mixed = anchor | {
            "partner_z_mean": partner["z_mean"], "partner_z_std": partner["z_std"],
            "partner_caption": partner["caption"], "caption": caption,
            "mix_ratio": torch.tensor(ratio, dtype=torch.float32),
        }  # fmt: skip
        if self.has_embeds and caption == partner["caption"]:
            mixed["text_embed"] = partner["text_embed"]
        return mixed

    def read(self, index: int, epoch: int) -> dict:
        """An unmixed item."""
        shard, row = self.places[index]
        captions = self.clips[index]["captions"]
        choice = int(np.random.default_rng([self.seed, epoch, index]).integers(len(captions)))
        if shard not in self.files:
            self.files[shard] = safe_open(self.paths[shard], framework="pt")
        file = self.files[shard]
        item = {name: file.get_slice(name)[row] for name in LATENTS}
        if self.has_embeds:
            item["audio_embed"] = file.get_slice("audio_embed")[row]
            item["text_embed"] = file.get_slice("text_embed")[self.first_caption[index] + choice]
        return item | {"caption": captions[choice]}

    def group(self, mixup: Mixup) -> None:
        """Who may be mixed with whom: tracks with windows at downbeats, by tempo."""
        if mixup.space != "latent":
            raise InputError(
                "mixup.space=audio: cached latents are not mixed as sound; give mixup= to `ldm-audio encode`"
            )
        if mixup.text == "both":
            raise InputError(
                "mixup.text=both: a cache has no embedding of joined captions; anchor and louder have"
            )
        self.downbeat_windows: dict[str, list[int]] = defaultdict(list)
        for index, clip in enumerate(self.clips):
            if clip.get("downbeat"):
                self.downbeat_windows[clip["file"]].append(index)
        self.tracks = list(self.downbeat_windows)
        if not self.tracks:
            raise InputError("mixup: none of the cached windows begins at a downbeat; encode data=windows")
        self.track_number = {file: number for number, file in enumerate(self.tracks)}
        tempos = [self.clips[windows[0]]["tempo"] for windows in self.downbeat_windows.values()]
        self.groups = TempoGroups(tempos, mixup)

    def draw_pair(self, index: int, rng: np.random.Generator) -> tuple[int, int] | None:
        """The windows to be mixed, both at a downbeat, or None."""
        number = self.track_number.get(self.clips[index].get("file"))
        if rng.random() >= self.mixup.prob or number is None:
            return None
        partner = self.groups.draw(number, rng)
        if partner is None:
            return None
        both = (self.downbeat_windows[self.tracks[track]] for track in (number, partner))
        anchor, other = (windows[int(rng.integers(len(windows)))] for windows in both)
        return anchor, other


def read_index(folder: Path) -> dict:
    """What `index.json` says; InputError where an encoding is missing or not complete."""
    shards = len(list(folder.glob("shard_*.safetensors")))
    if not shards:
        raise InputError(f"{folder}: no shard_*.safetensors; make them with `ldm-audio encode out={folder}`")
    path = folder / INDEX
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        named = {"shards", "made_by"} <= index.keys()
    except FileNotFoundError as error:
        raise InputError(
            f"{folder}: {shards} shards and no {INDEX}: not complete, encode again to go on"
        ) from error
    except (json.JSONDecodeError, AttributeError) as error:
        raise InputError(f"{path}: not the index of an encoding") from error
    if not named:
        raise InputError(f"{path}: not the index of an encoding")
    return index


def read_header(path: Path) -> dict:
    """The header of a shard, with the names of its `tensors`; InputError if it is damaged or another's."""
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(HEADER, "{}"))
            held = set(file.keys())
    except (SafetensorError, FileNotFoundError) as error:
        raise InputError(f"{path}: not a readable shard of latents ({error})") from error
    if lacking := (LATENTS | EMBEDS if held & EMBEDS else LATENTS) - held:
        raise InputError(f"{path}: not a readable shard of latents (no {min(lacking)})")
    if not {"clips", "made_by"} <= header.keys():
        raise InputError(f"{path}: its header has no clips and made_by; `ldm-audio encode` did not write it")
    return header | {"tensors": held}
