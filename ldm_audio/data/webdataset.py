"""Tar files of clips as LAION's audio data sets are shipped: `key.flac` beside `key.json`.

The JSON holds `text` (a caption or a list of them), and may hold `text_augment_t5` (captions written by a
language model) and `tag` (labels, made to a caption by a template). Each tar, in a folder or behind an
http(s) address, is read through once for the places of its sounds and for its texts; after that an item is
one read at a known offset, so that tars are shuffled, split over ranks and workers and resumed exactly as a
folder is.

Departures from LAION's loader, which streams tars through a shuffle buffer: every clip once an epoch, in an
order that (seed, epoch) alone decides; a remote clip is one request for a range of bytes.

Axes: c channels, s samples.
"""

import hashlib
import io
import json
import logging
import os
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
import soundfile

from ldm_audio.audio.io import AudioInfo, one_line
from ldm_audio.data.clips import CaptionChoice, Channel, Normalise, Preparation
from ldm_audio.data.loader import ItemKey
from ldm_audio.data.remote import Body, expand, is_address, read_part, read_through, version
from ldm_audio.errors import InputError, RunError
from ldm_audio.files import write_json

logger = logging.getLogger(__name__)

AUDIO = ("flac", "wav", "ogg", "mp3")
TEXTS = ("text", "text_augment_t5", "tag")
SCANNERS = 8  # tars that are read through at a time
NAMED = 5  # clips that a warning names

Tar = Path | str
"""A file, or an http(s) address."""


@dataclass(frozen=True)
class Member:
    """A clip of a tar: its key, where its sound begins and how many bytes it has, and its JSON's texts."""

    key: str
    audio: tuple[int, int]
    described: dict


@dataclass(frozen=True)
class Index:
    """The clips of a tar in order, and why the others are left out, by key."""

    members: list[Member]
    left_out: dict[str, str]


def find_tars(path: str | Path) -> list[Tar]:
    """The tar files of a folder and of those below it, in order; the one named; or the addresses."""
    if is_address(path):
        return expand(str(path))
    path = Path(path)
    if path.is_file():
        return [path]
    found = sorted(path.rglob("*.tar")) if path.is_dir() else []
    if not found:
        raise InputError(f"{path}: no such tar file, nor a folder with some, nor an http(s) address")
    return found


def index_tars(tars: list[Tar], folder: Path) -> list[Index]:
    """The index of each tar, made or read. Several at a time, and in another order in every process, so that
    ranks that begin together share the work."""
    order = np.random.default_rng(os.getpid()).permutation(len(tars))
    pool = ThreadPoolExecutor(SCANNERS)
    try:
        found = dict(zip(order, pool.map(lambda number: index_tar(tars[number], folder), order)))
    finally:
        pool.shutdown(cancel_futures=True)
    return [found[number] for number in range(len(tars))]


def index_tar(tar: Tar, folder: Path) -> Index:
    """The clips of a tar that have both sound and JSON; from a file where that fits, which is made otherwise.

    The file is `NAME.tar.index.json` beside a local tar, and in `folder` for a remote one.
    """
    if isinstance(tar, Path):
        path, stamp = tar.with_name(f"{tar.name}.index.json"), [tar.stat().st_size, tar.stat().st_mtime_ns]
    else:
        path, stamp = folder / remote_index_name(tar), version(tar)
    index = read_index(path, stamp)
    if index is None:
        index = scan_tar(tar)
        try:
            write_json(path, {"tar": stamp} | asdict(index))
        except RunError as error:
            logger.warning(f"{error}; the tar is read through every time")
    if index.left_out:
        named = ", ".join(f"{key} ({why})" for key, why in list(index.left_out.items())[:NAMED])
        more = f" and {len(index.left_out) - NAMED} more" if len(index.left_out) > NAMED else ""
        logger.warning(f"{tar}: {len(index.left_out)} clips left out: {named}{more}")
    return index


def remote_index_name(address: str) -> str:
    """The same for an address that is signed anew."""
    place = urlsplit(address)._replace(query="", fragment="").geturl()
    digest = hashlib.blake2b(place.encode(), digest_size=8).hexdigest()
    return f"{Path(urlsplit(place).path).name}.{digest}.index.json"


def read_index(path: Path, stamp: list) -> Index | None:
    """An index that was kept, None where there is none of the tar as it is now."""
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["tar"] != stamp:
            return None
        members = [Member(m["key"], tuple(m["audio"]), m["described"]) for m in kept["members"]]
        return Index(members, kept["left_out"])
    except (json.JSONDecodeError, KeyError, TypeError):
        logger.warning(f"{path}: not an index; made anew")
        return None


def scan_tar(tar: Tar) -> Index:
    """Reads a tar through. One that is cut short keeps its whole clips; InputError where it has none."""
    if isinstance(tar, str):
        return read_through(tar, lambda body: scan(body, "r|", body.length, tar))
    with tar.open("rb") as file:
        return scan(file, "r:", tar.stat().st_size, tar)


def scan(file: BinaryIO | Body, mode: str, length: int | None, tar: Tar) -> Index:
    """mode: tarfile's, `r|` for what cannot be read twice. length: of the tar in bytes, where it is known."""
    audio: dict[str, tuple[int, int]] = {}
    described: dict[str, dict] = {}
    wrong: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode=mode) as members:
            for member in members:
                key, _, suffix = member.name.rpartition(".")
                if not member.isfile() or not key or suffix.lower() not in (*AUDIO, "json"):
                    continue
                if length is not None and member.offset_data + member.size > length:
                    wrong[key] = "cut short"
                elif suffix.lower() in AUDIO:
                    audio[key] = member.offset_data, member.size
                else:
                    try:
                        described[key] = read_described(members.extractfile(member).read())
                    except ValueError as error:
                        wrong[key] = str(error)
    except (tarfile.TarError, EOFError) as error:
        if not audio:
            raise InputError(f"{tar}: not a readable tar file ({error})") from error
        logger.warning(f"{tar}: cut short or damaged ({error}); what comes before is used")
    whole = [
        Member(key, audio[key], described[key]) for key in audio if key in described and key not in wrong
    ]
    for key in sorted((audio.keys() ^ described.keys()) - wrong.keys()):
        wrong[key] = "no JSON" if key in audio else "no sound"
    return Index(whole, wrong)


def read_described(content: bytes) -> dict:
    """What a clip's JSON says in words; ValueError where that is nothing."""
    try:
        described = json.loads(content)
    except ValueError as error:
        raise ValueError("its JSON cannot be read") from error
    if not isinstance(described, dict) or not captions_of(described, template="{}"):
        raise ValueError("its JSON has neither text nor tag")
    return {name: described[name] for name in TEXTS if name in described}


def captions_of(described: dict, *, template: str) -> list[str]:
    """The captions in a clip's JSON; of its labels, where it has no others: "The sounds of A, B and C"."""
    own, augmented, labels = (words_of(described.get(name)) for name in TEXTS)
    if own or augmented or not labels:
        return own + augmented
    *first, last = labels
    return [template.format(f"{', '.join(first)} and {last}" if first else last)]


def words_of(value: object) -> list[str]:
    """The texts in a string or a list, without empty ones."""
    values = value if isinstance(value, list) else [value]
    return [text.strip() for text in values if isinstance(text, str) and text.strip()]


class TarClips(Preparation):
    """Clips of tar files; items as `Clips` makes them, with one of their captions.

    path: a folder of tars, one of them, or an http(s) address, in which `{000..031}` stands for many.
    index_folder: where the indices of remote tars are kept; those of local ones lie beside them.
    The other settings are those of `Preparation`.

    Raises InputError where no tar or no clip is to be found; reading does, naming tar and key, for a sound
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
        caption: CaptionChoice,
        channel: Channel,
        template: str,
        index_folder: str | Path,
    ):
        super().__init__(
            sample_rate=sample_rate, num_samples=num_samples, seed=seed, normalise=normalise,
            random_crop=random_crop, caption=caption, channel=channel,
        )  # fmt: skip
        tars = find_tars(path)
        indices = index_tars(tars, Path(index_folder))
        self.places = [(tar, member) for tar, index in zip(tars, indices) for member in index.members]
        if not self.places:
            raise InputError(f"{path}: no clips in its {len(tars)} tar files, expected key.flac and key.json")
        self.template = template

    def __len__(self) -> int:
        return len(self.places)

    def captions(self) -> list[str]:
        """Every caption of every clip."""
        return [
            text
            for _, member in self.places
            for text in captions_of(member.described, template=self.template)
        ]

    def __getitem__(self, key: ItemKey | int) -> dict:
        epoch, index, _ = (0, key, key) if isinstance(key, int) else key
        rng = np.random.default_rng([self.seed, epoch, index])
        tar, member = self.places[index]
        captions = captions_of(member.described, template=self.template)
        caption = self.choose_caption(captions, rng)
        samples, rate = self.read_audio(tar, member)  # (c, s)
        mono = self.mono(samples)
        info = AudioInfo(sample_rate=rate, num_samples=len(mono), num_channels=len(samples))
        segment = self.segment(lambda start, length: (mono[start : start + length], rate), info, rng)
        return {
            "waveform": self.fitted(*segment),
            "caption": caption,
            "file_name": f"{tar}/{member.key}",
        }

    def read_audio(self, tar: Tar, member: Member) -> tuple[np.ndarray, int]:
        """float32 (c, s) of the whole clip, and its rate."""
        try:
            content = io.BytesIO(read_bytes(tar, *member.audio))
            samples, rate = soundfile.read(content, dtype="float32", always_2d=True)
        except soundfile.SoundFileError as error:
            raise InputError(f"{tar}: {member.key}: broken audio ({one_line(error)})") from error
        if not len(samples) or not np.isfinite(samples).all():
            raise InputError(f"{tar}: {member.key}: empty, or holds NaN or infinity")
        return samples.T, rate


def read_bytes(tar: Tar, start: int, size: int) -> bytes:
    if isinstance(tar, str):
        return read_part(tar, start, size)
    with tar.open("rb") as file:
        file.seek(start)
        return file.read(size)
