"""The beats of all recordings of a folder in one table beside its CSV: `beats.jsonl`.

The first line says which tracker made it, in which version and with which settings; each other line is a
recording: its name, what its header said, tempo, beats and downbeats in seconds. A line is written when its
recording is done, so that a killed run goes on where it stopped; at the end the lines are put in order.
"""

import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from ldm_audio.audio.beats import Beats, Tracker
from ldm_audio.audio.io import AudioInfo, probe
from ldm_audio.data.manifest import READABLE
from ldm_audio.errors import InputError, RunError
from ldm_audio.files import write_text

logger = logging.getLogger(__name__)

TABLE = "beats.jsonl"
FORMAT = 1


@dataclass(frozen=True)
class Outcome:
    """Of one run over a folder: how many recordings, how many of them now, which failed and why."""

    total: int
    tracked: int
    failed: dict[str, str]


def track_folder(
    folder: str | Path,
    *,
    tracker: Tracker,
    table: str | Path,
    num_workers: int,
    progress: Callable[[int], None],
) -> Outcome:
    """Tracks every audio file below `folder` that `table` lacks; calls `progress(n)` for n files done.

    num_workers: processes; 0 tracks in this one. A recording that cannot be read is counted and has no line.
    A recording that changed since is tracked again.

    Raises InputError for a folder without audio and a table of another tracker, RunError for a full disk.
    """
    root, table = Path(folder), Path(table)
    names = audio_names(root)
    header = {"format": FORMAT, "tracker": tracker.name, "version": tracker.version, **tracker.settings}
    done = {}
    if table.exists():
        found, done = read_lines(table)
        if found != header:
            raise InputError(
                f"{table}: made by {described(found)}, not by {described(header)}; remove it first"
            )
    lines = {name: line for name, line in done.items() if name in names and is_of(line, root / name)}
    left = [name for name in names if name not in lines]
    progress(len(lines))
    failed = {}
    try:
        write_table(table, header, lines)  # whole lines only, whatever a killed run left
        with table.open("a", encoding="utf-8") as file:
            for name, outcome in track_all(tracker, root, left, num_workers):
                if isinstance(outcome, str):
                    failed[name] = outcome
                else:
                    lines[name] = outcome
                    file.write(json.dumps(outcome, ensure_ascii=False) + "\n")
                    file.flush()
                progress(1)
            os.fsync(file.fileno())
        write_table(table, header, lines)
    except OSError as error:
        raise RunError(f"{table}: not written ({error.strerror or error}); what was done is kept") from error
    return Outcome(len(names), len(left) - len(failed), failed)


def audio_names(root: Path) -> list[str]:
    """The audio files below a folder, relative to it and in order; InputError where there are none."""
    if not root.is_dir():
        raise InputError(f"{root}: no such folder")
    paths = (path for path in root.rglob("*") if path.suffix.lower() in READABLE and path.is_file())
    names = sorted(path.relative_to(root).as_posix() for path in paths if not path.name.startswith("."))
    if not names:
        raise InputError(f"{root}: no audio files below it")
    return names


def track_all(
    tracker: Tracker, root: Path, names: Sequence[str], num_workers: int
) -> Iterator[tuple[str, dict | str]]:
    """(name, its line or why there is none), as they are done."""
    if num_workers == 0 or not names:
        for name in names:
            yield name, track_one(tracker, root, name)
        return
    # spawned, because a forked copy of a process with running threads (torch, numba) may hang
    with ProcessPoolExecutor(num_workers, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(track_one, tracker, root, name): name for name in names}
        try:
            for future in as_completed(futures):
                yield futures[future], future.result()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def track_one(tracker: Tracker, root: Path, name: str) -> dict | str:
    """The line of one recording, or why it has none."""
    try:
        info = probe(root / name)
        found = tracker(root / name)
    except InputError as error:
        return str(error)
    return {
        "file": name,
        "num_samples": info.num_samples,
        "sample_rate": info.sample_rate,
        "tempo": round(found.tempo, 3),
        "beats": list(found.beats),
        "downbeats": list(found.downbeats),
    }


def is_of(line: dict, path: Path) -> bool:
    """Whether a line is that of the recording as it is now."""
    try:
        return (line["num_samples"], line["sample_rate"]) == (
            probe(path).num_samples,
            probe(path).sample_rate,
        )
    except InputError:
        return False


def write_table(table: Path, header: dict, lines: dict[str, dict]) -> None:
    rows = [header, *(lines[name] for name in sorted(lines))]
    write_text(table, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_lines(table: Path) -> tuple[dict, dict[str, dict]]:
    """The header and the lines by file name; a last line without its end was not finished and is left out."""
    try:
        text = table.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{table}: not a readable table of beats ({error})") from error
    rows = []
    for number, line in enumerate(text[: text.rfind("\n") + 1].splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise InputError(f"{table}: line {number}: not JSON ({error.msg})") from error
    if not rows or not isinstance(rows[0], dict) or rows[0].get("format") != FORMAT:
        raise InputError(f"{table}: no table of beats; `ldm-audio beats` writes them")
    lacking = [row for row in rows[1:] if not {"file", "num_samples", "beats", "downbeats"} <= row.keys()]
    if lacking:
        raise InputError(f"{table}: a line without file, num_samples, beats and downbeats")
    return rows[0], {row["file"]: row for row in rows[1:]}


def described(header: dict) -> str:
    settings = ", ".join(
        f"{k}={v}" for k, v in header.items() if k not in ("format", "tracker", "version", "name")
    )
    return f"{header['tracker']} {header['version']}" + (f" ({settings})" if settings else "")


def beats_of(
    table: str | Path, recordings: Sequence[tuple[Path, AudioInfo]], *, root: str | Path
) -> list[Beats]:
    """The beats of these recordings, whose names in the table are relative to the folder `root`.

    Raises InputError for a recording that the table lacks, and for one that is not as it was when tracked.
    """
    table = Path(table)
    if not table.is_file():
        raise InputError(f"{table}: no such file; make it with `ldm-audio beats {root}`")
    _, lines = read_lines(table)
    found = []
    for path, info in recordings:
        name = Path(os.path.relpath(path, root)).as_posix()
        line = lines.get(name)
        if line is None:
            raise InputError(f"{table}: no beats of {name}; run `ldm-audio beats {root}` again")
        if (line["num_samples"], line["sample_rate"]) != (info.num_samples, info.sample_rate):
            raise InputError(
                f"{table}: the beats of {name} are those of a recording of {line['num_samples']} samples at "
                f"{line['sample_rate']} Hz; it has {info.num_samples} at {info.sample_rate} Hz"
            )
        try:
            duration = info.num_samples / info.sample_rate
            found.append(Beats(tuple(line["beats"]), tuple(line["downbeats"]), duration))
        except InputError as error:
            raise InputError(f"{table}: {name}: {error}") from error
    return found
