"""Which recordings with which captions: a folder with a CSV, or AudioCaps' own CSV with a folder of audio.

Several rows of one file are several captions of it. In a folder, whose files and rows are the user's own, a
bad row is an error; so are unreadable files, unless they are few. AudioCaps is downloaded clip by clip and
some of its videos are gone for good, so there what cannot be used is counted, listed, and left out.
"""

import csv as csv_format
import logging
import os
import string
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from ldm_audio.audio.io import AudioInfo, probe
from ldm_audio.errors import InputError
from ldm_audio.files import write_json

logger = logging.getLogger(__name__)

TOLERATED = 0.05  # share of a folder's files that may be unreadable

AUDIOCAPS_COLUMNS = ("audiocap_id", "youtube_id", "start_time", "caption")

# Formats that libsndfile reads come before those that it does not: these are then reported as unreadable.
READABLE = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64")
UNREADABLE = (".m4a", ".mp4", ".aac", ".webm", ".mkv", ".wma")


@dataclass(frozen=True)
class Clip:
    """A recording, its captions (at least one), what its header says, and its first row's other columns."""

    path: Path
    captions: tuple[str, ...]
    info: AudioInfo
    extra: dict[str, str] = field(default_factory=dict)


class Row(NamedTuple):
    """A row of a CSV and the line of the file on which it ends."""

    line: int
    values: dict[str, str]


@dataclass
class Report:
    """What became of every row of AudioCaps' CSV; all but the counts list what was left out."""

    csv: str
    audio_root: str
    rows: int = 0
    clips: int = 0
    captions: int = 0
    hours: float = 0.0
    missing: list[str] = field(default_factory=list)
    unreadable: list[dict[str, str]] = field(default_factory=list)
    empty_captions: list[str] = field(default_factory=list)

    def summary(self) -> str:
        return (
            f"{self.clips} usable clips of {self.rows} rows ({len(self.missing)} clips missing, "
            f"{len(self.unreadable)} unreadable, {len(self.empty_captions)} empty captions)"
        )


def folder_clips(
    path: str | Path,
    *,
    csv: str,
    file_column: str = "file_name",
    caption_column: str = "caption",
    report: str | Path | None = None,
) -> list[Clip]:
    """The clips of `path`/`csv`, in the order of their first rows; file names are relative to `path`.

    Every header is read, which a bar shows where it takes more than a few seconds. Files that are missing or
    unreadable are left out, logged and listed as JSON in `report` where they are few, at most `TOLERATED` of
    all. Raises InputError where they are more, with the first one's line, and for a folder or CSV that is
    missing or empty, a missing column, and an empty caption.
    """
    root = Path(path)
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    if not any(root.iterdir()):
        raise InputError(f"{root}: the folder is empty, expected {csv} and audio files")
    table = root / csv
    captions: dict[str, list[str]] = {}
    clips: dict[str, tuple[AudioInfo, dict[str, str]]] = {}
    bad: dict[str, InputError] = {}
    rows = read_rows(table, (file_column, caption_column))
    for line, values in tqdm(rows, desc=f"headers of {table.name}", delay=5, dynamic_ncols=True, leave=False):
        name, caption = values.pop(file_column).strip(), values.pop(caption_column).strip()
        if not name:
            raise InputError(f"{table}: line {line}: empty {file_column}")
        if not caption:
            raise InputError(f"{table}: line {line}: empty {caption_column} of {name}")
        if name not in clips and name not in bad:
            try:
                clips[name] = probe(root / name), values
            except InputError as error:
                bad[name] = InputError(f"{table}: line {line}: {error}")
        captions.setdefault(name, []).append(caption)
    if bad:
        tell_unreadable(table, bad, len(captions), report)
    return [Clip(root / name, tuple(captions[name]), info, extra) for name, (info, extra) in clips.items()]


def tell_unreadable(
    table: Path, bad: dict[str, InputError], num_files: int, report: str | Path | None
) -> None:
    """Logs and lists the files that cannot be used, or raises the first one's error where they are many."""
    first = next(iter(bad.values()))
    if len(bad) > TOLERATED * num_files:
        more = f" (and {len(bad) - 1} more of {num_files} files)" if len(bad) > 1 else ""
        raise InputError(f"{first}{more}")
    told = f"{len(bad)} of {num_files} files are left out, the first: {first}"
    if report is not None:
        write_json(report, [{"clip": name, "reason": str(error)} for name, error in bad.items()])
        told += f"; listed in {report}"
    logger.warning(told)


def audiocaps_clips(
    csv: str | Path, audio_root: str | Path, *, patterns: Sequence[str], report: str | Path | None
) -> list[Clip]:
    """The clips of AudioCaps' CSV (`audiocap_id,youtube_id,start_time,caption`) that `audio_root` holds.

    patterns: file names without their extension, such as `{youtube_id}_{start_time}`, tried in turn; the
    files may lie in subfolders and have any audio extension. report: where to write what was left out, as
    JSON; None writes nothing, a count is logged in either case.

    Raises InputError for a missing CSV, column or folder, a pattern with an unknown column, or where no clip
    is usable (the report is written before).
    """
    rows = read_rows(Path(csv), AUDIOCAPS_COLUMNS)
    check_patterns(patterns, rows[0].values)
    if not Path(audio_root).is_dir():
        raise InputError(f"{audio_root}: no such folder, expected AudioCaps' audio files")
    files = files_by_stem(Path(audio_root))
    outcome = Report(str(csv), str(audio_root), rows=len(rows))
    clips: dict[str, Clip | None] = {}  # None: counted as missing or unreadable already
    captions: dict[str, list[str]] = {}
    for line, values in rows:
        name, caption = f"{values['youtube_id']}_{values['start_time']}", values["caption"].strip()
        if not caption:
            outcome.empty_captions.append(f"line {line}: {name}")
            continue
        if name not in clips:
            clips[name] = find_clip(name, values, files, patterns, outcome)
        captions.setdefault(name, []).append(caption)
    usable = [
        Clip(clip.path, tuple(captions[name]), clip.info, clip.extra) for name, clip in clips.items() if clip
    ]
    outcome.clips = len(usable)
    outcome.captions = sum(len(clip.captions) for clip in usable)
    outcome.hours = hours(usable)
    told = f"{csv}: {outcome.summary()} under {audio_root}"
    if report is not None:
        write_json(report, asdict(outcome))
        told += f", listed in {report}"
    if not usable:
        raise InputError(f"{told}; expected files named {' or '.join(patterns)}")
    if outcome.missing or outcome.unreadable or outcome.empty_captions:
        logger.warning(told)
    return usable


def hours(clips: Iterable[Clip]) -> float:
    """Length of all the recordings together."""
    return sum(clip.info.num_samples / clip.info.sample_rate for clip in clips) / 3600


def read_rows(path: Path, required: Sequence[str]) -> list[Row]:
    """All rows of a CSV with a header. InputError where it is missing, empty, ragged or lacks a column."""
    if not path.is_file():
        raise InputError(f"{path}: no such file, expected a CSV with the columns {','.join(required)}")
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv_format.DictReader(file, strict=True)
            found = reader.fieldnames or []
            missing = [name for name in required if name not in found]
            if missing:
                raise InputError(
                    f"{path}: no column {','.join(missing)}; found {','.join(found) or 'nothing'}"
                )
            rows = [Row(reader.line_num, values) for values in reader]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not a UTF-8 text file ({error.reason} at byte {error.start})") from error
    except csv_format.Error as error:
        raise InputError(f"{path}: line {reader.reader.line_num}: not a CSV ({error})") from error
    if not rows:
        raise InputError(f"{path}: no rows below its header {','.join(found)}")
    for line, values in rows:
        if None in values or None in values.values():  # DictReader's marks of surplus and lacking fields
            raise InputError(f"{path}: line {line}: expected the {len(found)} fields {','.join(found)}")
    return rows


def check_patterns(patterns: Sequence[str], columns: Iterable[str]) -> None:
    """InputError for no pattern, or one that asks for a column the CSV lacks."""
    if not patterns:
        raise InputError("patterns: expected at least one, such as {youtube_id}_{start_time}")
    for pattern in patterns:
        try:
            asked = {name for _, name, _, _ in string.Formatter().parse(pattern) if name is not None}
        except ValueError as error:
            raise InputError(f"pattern {pattern!r}: {error}") from error
        if unknown := asked - set(columns):
            raise InputError(
                f"pattern {pattern!r}: no column {','.join(sorted(unknown))}; found {','.join(columns)}"
            )


def files_by_stem(root: Path) -> dict[str, Path]:
    """File names without extension -> the audio file below `root`; of several, the first in order."""
    order = {suffix: place for place, suffix in enumerate(READABLE + UNREADABLE)}
    found: dict[str, tuple[int, Path]] = {}
    for folder, subfolders, names in os.walk(root):
        subfolders.sort()
        for name in sorted(names):
            stem, suffix = os.path.splitext(name)
            place = order.get(suffix.lower())
            if place is not None and (stem not in found or place < found[stem][0]):
                found[stem] = place, Path(folder, name)
    return {stem: path for stem, (_, path) in found.items()}


def find_clip(
    name: str, values: dict[str, str], files: dict[str, Path], patterns: Sequence[str], outcome: Report
) -> Clip | None:
    """The row's clip without captions yet, or None, noted in `outcome`."""
    stems = (pattern.format(**values) for pattern in patterns)
    path = next((files[stem] for stem in stems if stem in files), None)
    if path is None:
        outcome.missing.append(name)
        return None
    try:
        info = probe(path)
    except InputError as error:
        outcome.unreadable.append({"clip": name, "reason": str(error)})
        return None
    return Clip(path, (), info, {column: value for column, value in values.items() if column != "caption"})
