"""The table of beats: complete, resumed, ordered, and refused where it does not fit the recordings."""

import errno
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.io import probe, write_wav
from ldm_audio.data import beat_table
from ldm_audio.data.beat_table import beats_of, track_folder
from ldm_audio.errors import InputError, RunError

DATA = os.environ.get("LDM_AUDIO_DATA")


@dataclass(frozen=True)
class EveryHalfSecond:
    """Beats at every half second, the first four to the bar; keeps a list of the calls in a file."""

    calls: str
    version: str = "1"
    stop_after: int = 10**9
    name: str = "metronome"

    @property
    def settings(self) -> dict:
        return {"period": 0.5}

    def __call__(self, path: Path) -> Beats:
        with open(self.calls, "a") as file:
            file.write(f"{path.name}\n")
        if len(Path(self.calls).read_text().splitlines()) > self.stop_after:
            raise KeyboardInterrupt
        info = probe(path)
        duration = info.num_samples / info.sample_rate
        beats = tuple(np.arange(0.0, duration, 0.5).tolist())
        return Beats(beats, beats[::4], duration)


def folder_of(path: Path, count: int) -> Path:
    for number in range(count):
        write_wav(path / "music" / f"{number}.wav", np.zeros(8000 * (number + 1)), 8000)
    return path


def track(folder: Path, workers: int = 0, **changes):
    settings = {"calls": str(folder / "calls.txt")} | changes
    return track_folder(
        folder,
        tracker=EveryHalfSecond(**settings),
        table=folder / "beats.jsonl",
        num_workers=workers,
        progress=lambda n: None,
    )


def calls(folder: Path) -> list[str]:
    return (folder / "calls.txt").read_text().split()


def beats(folder: Path, *names: str) -> list[Beats]:
    paths = [folder / "music" / name for name in names]
    return beats_of(folder / "beats.jsonl", [(path, probe(path)) for path in paths], root=folder)


def test_every_recording_has_its_own_beats(tmp_path):
    outcome = track(folder_of(tmp_path, 3))
    assert (outcome.total, outcome.tracked, outcome.failed) == (3, 3, {})
    two, one = beats(tmp_path, "1.wav", "0.wav")
    assert two == Beats((0.0, 0.5, 1.0, 1.5), (0.0,), 2.0) and one == Beats((0.0, 0.5), (0.0,), 1.0)
    header = json.loads((tmp_path / "beats.jsonl").read_text().splitlines()[0])
    assert header == {"format": 1, "tracker": "metronome", "version": "1", "period": 0.5}


def test_a_killed_run_goes_on_and_ends_in_the_same_table(tmp_path):
    whole, killed = folder_of(tmp_path / "whole", 5), folder_of(tmp_path / "killed", 5)
    track(whole)
    with pytest.raises(KeyboardInterrupt):
        track(killed, stop_after=3)
    table = killed / "beats.jsonl"
    table.write_text(table.read_text() + '{"file": "music/3.wav", "num_sam')  # killed within a line
    assert track(killed).tracked == 2
    assert table.read_text() == (whole / "beats.jsonl").read_text()
    assert sorted(calls(killed)) == sorted(["0.wav", "1.wav", "2.wav", "3.wav", "3.wav", "4.wav"])
    assert track(killed).tracked == 0 and len(calls(killed)) == 6


def test_several_processes_write_the_same_table(tmp_path):
    alone, several = folder_of(tmp_path / "alone", 3), folder_of(tmp_path / "several", 3)
    track(alone)
    track(several, workers=2)
    assert (alone / "beats.jsonl").read_text() == (several / "beats.jsonl").read_text()


def test_a_recording_that_changed_is_tracked_again_and_one_that_went_leaves_the_table(tmp_path):
    track(folder_of(tmp_path, 3))
    write_wav(tmp_path / "music" / "0.wav", np.zeros(24000), 8000)
    (tmp_path / "music" / "1.wav").unlink()
    with pytest.raises(
        InputError, match=r"beats of music/0\.wav are those of .* 8000 samples .* it has 24000"
    ):
        beats(tmp_path, "0.wav")
    assert track(tmp_path).tracked == 1
    assert beats(tmp_path, "0.wav")[0].duration == 3.0
    assert "1.wav" not in (tmp_path / "beats.jsonl").read_text()


def test_a_broken_recording_is_counted_named_and_left_out(tmp_path):
    folder_of(tmp_path, 2)
    (tmp_path / "music" / "broken.wav").write_bytes(b"RIFF")
    outcome = track(tmp_path)
    assert (outcome.total, outcome.tracked) == (3, 2) and list(outcome.failed) == ["music/broken.wav"]
    assert "not a readable audio file" in outcome.failed["music/broken.wav"]
    assert len((tmp_path / "beats.jsonl").read_text().splitlines()) == 3


def test_a_table_of_another_tracker_is_left_alone(tmp_path):
    track(folder_of(tmp_path, 1))
    before = (tmp_path / "beats.jsonl").read_text()
    with pytest.raises(InputError, match=r"made by metronome 1 \(period=0\.5\), not by metronome 2"):
        track(tmp_path, version="2")
    assert (tmp_path / "beats.jsonl").read_text() == before


def test_a_full_disk_keeps_what_was_done(tmp_path, monkeypatch):
    folder_of(tmp_path, 4)
    with pytest.raises(KeyboardInterrupt):
        track(tmp_path, stop_after=2)

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(beat_table.os, "fsync", full)
        with pytest.raises(RunError, match=r"beats\.jsonl: not written \(No space left on device\)"):
            track(tmp_path)
    assert track(tmp_path).tracked <= 2
    assert len((tmp_path / "beats.jsonl").read_text().splitlines()) == 5


def test_what_is_no_table_or_lacks_a_recording_is_refused_by_name(tmp_path):
    track(folder_of(tmp_path, 1))
    write_wav(tmp_path / "music" / "new.wav", np.zeros(8000), 8000)
    with pytest.raises(InputError, match=r"no beats of music/new\.wav; run `ldm-audio beats .*` again"):
        beats(tmp_path, "new.wav")
    table = tmp_path / "beats.jsonl"
    lines = table.read_text().splitlines()
    row = json.loads(lines[1])
    for text, told in (
        ("", "no table of beats"),
        ('{"a": 1}\n', "no table of beats"),
        (f"{lines[0]}\nnonsense\n", "line 2: not JSON"),
        (f"{lines[0]}\n{{}}\n", "a line without file"),
        (f"{lines[0]}\n{json.dumps(row | {'beats': [0.5, 77.0]})}\n", r"music/0\.wav: beats up to 77\.00 s"),
    ):
        table.write_text(text)
        with pytest.raises(InputError, match=told):
            beats(tmp_path, "0.wav")
    table.unlink()
    with pytest.raises(InputError, match=r"beats\.jsonl: no such file; make it with `ldm-audio beats"):
        beats(tmp_path, "0.wav")
    with pytest.raises(InputError, match="no audio files below it"):
        (tmp_path / "empty").mkdir()
        track(tmp_path / "empty")


def test_the_command_writes_the_table_and_says_what_it_skipped(tmp_path, command, capsys):
    folder_of(tmp_path, 1)
    (tmp_path / "music" / "broken.wav").write_bytes(b"RIFF")
    assert command("ldm_audio.cli", "beats", tmp_path) == 0
    told = capsys.readouterr()
    assert "beats.jsonl: 1 recordings, 1 of them new, 1 failed" in told.out
    assert "skipped music/broken.wav: " in told.err
    assert beats(tmp_path, "0.wav")[0].tempo == 0.0
    assert command("ldm_audio.cli", "beats", tmp_path, "--tracker", "beat_this") == 2
    assert "--tracker beat_this and --weights FILE go together" in capsys.readouterr().err


@pytest.mark.skipif(DATA is None, reason="LDM_AUDIO_DATA is unset: no real recordings")
@pytest.mark.slow
def test_every_real_recording_can_be_tracked(tmp_path, command):
    table = tmp_path / "beats.jsonl"
    assert command("ldm_audio.cli", "beats", f"{DATA}/soundbank", "--table", table) == 0
    rows = [json.loads(line) for line in table.read_text().splitlines()[1:]]
    assert len(rows) == 195 and sum(bool(row["beats"]) for row in rows) >= 10
