"""Tar files of clips as LAION's audio data sets are shipped: `key.flac` beside `key.json`.

The JSON holds `text` (a caption or a list of them), and may hold `text_augment_t5` (captions written by a
language model) and `tag` (labels, made to a caption by a template). Each local tar is read through once for
the places of its members; after that an item is two reads at known offsets, so that tars are shuffled, split
over ranks and workers and resumed exactly as a folder is. The index is kept beside the tar, or where that
cannot be written, made anew.

Departures from LAION's loader, which streams tars through a shuffle buffer: every clip once an epoch, in an
order that (seed, epoch) alone decides. Tars are local: one behind an address is to be downloaded first.

Axes: c channels, s samples.
"""

import io
import json
import logging
import tarfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile
import torch

from ldm_audio.audio.io import one_line, resample
from ldm_audio.data.clips import Channel, Normalise, peak_half
from ldm_audio.data.loader import ItemKey
from ldm_audio.errors import InputError, RunError
from ldm_audio.files import write_json

logger = logging.getLogger(__name__)

AUDIO = (".flac", ".wav", ".ogg", ".mp3")


@dataclass(frozen=True)
class Member:
    """A clip of a tar: its key, where sound and JSON begin, and how long they are, in bytes."""

    key: str
    audio: tuple[int, int]
    text: tuple[int, int]


def find_tars(path: str | Path) -> list[Path]:
    """The tar files of a folder and of those below it, in order, or the one named."""
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.tar")) if path.is_dir() else []
    if not found:
        raise InputError(f"{path}: no such tar file, nor a folder with some")
    return found


def index_tar(path: Path) -> list[Member]:
    """The clips of a tar that have both sound and JSON, in order; from `NAME.tar.index.json` where that fits.

    A tar that is cut short keeps its whole members, and a warning names it.
    """
    index = path.with_name(f"{path.name}.index.json")
    stamp = [path.stat().st_size, path.stat().st_mtime_ns]
    if index.is_file():
        try:
            kept = json.loads(index.read_text(encoding="utf-8"))
            if kept["tar"] == stamp:
                return [Member(m["key"], tuple(m["audio"]), tuple(m["text"])) for m in kept["members"]]
        except (json.JSONDecodeError, KeyError, TypeError):
            logger.warning(f"{index}: not an index; made anew")
    members = scan_tar(path)
    try:
        write_json(index, {"tar": stamp, "members": [asdict(member) for member in members]})
    except RunError as error:
        logger.warning(f"{error}; the tar is read through every time")
    return members


def scan_tar(path: Path) -> list[Member]:
    audio: dict[str, tuple[int, int]] = {}
    texts: dict[str, tuple[int, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, dot, suffix = member.name.rpartition(".")
                place = member.offset_data, member.size
                if member.isfile() and dot and f".{suffix.lower()}" in AUDIO:
                    audio[stem] = place
                elif member.isfile() and dot and suffix.lower() == "json":
                    texts[stem] = place
    except (tarfile.TarError, EOFError) as error:
        if not audio:
            raise InputError(f"{path}: not a readable tar file ({error})") from error
        logger.warning(f"{path}: cut short or damaged ({error}); its first {len(audio)} sounds are used")
    whole = path.stat().st_size
    keys = [key for key in audio if key in texts and sum(audio[key]) <= whole and sum(texts[key]) <= whole]
    if lacking := len(audio.keys() | texts.keys()) - len(keys):
        logger.warning(f"{path}: {lacking} members without their sound or JSON are left out")
    return [Member(key, audio[key], texts[key]) for key in keys]


def captions_of(described: dict, *, template: str) -> list[str]:
    """The captions in a clip's JSON; of its labels, where it has no others: "The sounds of A, B and C"."""
    texts: list[str] = []
    for key in ("text", "text_augment_t5"):
        value = described.get(key)
        texts += [value] if isinstance(value, str) else list(value or [])
    texts = [text.strip() for text in texts if isinstance(text, str) and text.strip()]
    labels = [label for label in described.get("tag") or [] if isinstance(label, str) and label.strip()]
    if texts or not labels:
        return texts
    *first, last = labels
    return [template.format(f"{', '.join(first)} and {last}" if first else last)]


class TarClips:
    """Clips of local tar files; items as `Clips` makes them, with one of their captions.

    caption: `random` draws one in every epoch, `first` takes the first.

    Raises InputError where no tar or no clip is to be found; reading does, naming tar and key, for a member
    that turns out broken, which the loader replaces.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        sample_rate: int,
        num_samples: int,
        seed: int,
        normalise: Normalise,
        random_crop: bool,
        caption: str,
        channel: Channel,
        template: str,
    ):
        tars = find_tars(path)
        self.places = [(tar, member) for tar in tars for member in index_tar(tar)]
        if not self.places:
            raise InputError(f"{path}: no clips in its {len(tars)} tar files, expected key.flac and key.json")
        self.sample_rate = sample_rate
        self.num_samples = num_samples
        self.seed = seed
        self.normalise = normalise
        self.random_crop = random_crop
        self.caption = caption
        self.channel = channel
        self.template = template

    def __len__(self) -> int:
        return len(self.places)

    def captions(self) -> list[str]:
        """Every caption of every clip; those without a readable JSON are named in a warning and left out."""
        found = []
        for tar, member in self.places:
            try:
                found += self.read_captions(tar, member)
            except InputError as error:
                logger.warning(f"{error}; its captions are left out")
        return found

    def __getitem__(self, key: ItemKey | int) -> dict:
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        rng = np.random.default_rng([self.seed, epoch, index])
        tar, member = self.places[index]
        captions = self.read_captions(tar, member)
        caption = captions[int(rng.integers(len(captions))) if self.caption == "random" else 0]
        samples, rate = self.read_audio(tar, member)  # (c, s)
        mono = samples[0] if self.channel == "first" else samples.mean(axis=0)
        length = -(-self.num_samples * rate // self.sample_rate)
        surplus = mono.shape[-1] - length
        start = int(rng.integers(surplus + 1)) if surplus > 0 and self.random_crop else 0
        waveform = resample(mono[start : start + length], rate, self.sample_rate)[: self.num_samples]
        waveform = peak_half(waveform) if self.normalise == "peak_half" else waveform
        padded = np.zeros(self.num_samples, np.float32)
        padded[: len(waveform)] = waveform
        return {"waveform": torch.from_numpy(padded), "caption": caption, "file_name": f"{tar}/{member.key}"}

    def read_captions(self, tar: Path, member: Member) -> list[str]:
        try:
            described = json.loads(read_bytes(tar, member.text))
        except ValueError as error:
            raise InputError(f"{tar}: {member.key}.json: not JSON") from error
        captions = captions_of(described, template=self.template) if isinstance(described, dict) else []
        if not captions:
            raise InputError(f"{tar}: {member.key}.json: neither text nor tag")
        return captions

    def read_audio(self, tar: Path, member: Member) -> tuple[np.ndarray, int]:
        """float32 (c, s) of the whole clip, and its rate."""
        try:
            samples, rate = soundfile.read(
                io.BytesIO(read_bytes(tar, member.audio)), dtype="float32", always_2d=True
            )
        except soundfile.SoundFileError as error:
            raise InputError(f"{tar}: {member.key}: broken audio ({one_line(error)})") from error
        if not len(samples) or not np.isfinite(samples).all():
            raise InputError(f"{tar}: {member.key}: empty, or holds NaN or infinity")
        return samples.T, rate


def read_bytes(tar: Path, place: Sequence[int]) -> bytes:
    start, size = place
    with tar.open("rb") as file:
        file.seek(start)
        return file.read(size)
