"""Rows and files to clips: grouping, AudioCaps' gaps and their report, and every mistake by its line."""

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest

from ldm_audio.audio.io import AudioInfo, write_wav
from ldm_audio.data.clips import AUDIOCAPS_PATTERNS
from ldm_audio.data.manifest import audiocaps_clips, folder_clips
from ldm_audio.errors import InputError

DATA = os.environ.get("LDM_AUDIO_DATA")
real_data = pytest.mark.skipif(DATA is None, reason="LDM_AUDIO_DATA is unset: no real recordings")

CAPTIONS = [
    ("91139", "r1nicOVtvkQ", "130", "A woman talks, nearby water pours"),
    ("1", "-id_two", "0", "a dog"),
    ("2", "r1nicOVtvkQ", "130", "Water is poured"),
    ("3", "broken", "20", "noise"),
    ("4", "gone", "20", "more noise"),
    ("5", "gone", "20", "more noise again"),
    ("6", "-id_two", "0", " "),
]


def sound(path: Path, num_samples: int = 800) -> Path:
    write_wav(path, np.full(num_samples, 0.25), 8000)
    return path


def table(path: Path, header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def audiocaps(tmp_path) -> tuple[Path, Path]:
    root = tmp_path / "audio"
    sound(root / "train" / "r1nicOVtvkQ_130.wav")
    sound(root / "Y-id_two.wav", 1600)
    (root / "Y-id_two.json").write_text("{}")
    (root / "broken_20.mp3").write_text("a web page")
    header = ("audiocap_id", "youtube_id", "start_time", "caption")
    return table(tmp_path / "train.csv", header, CAPTIONS), root


def test_rows_of_one_file_are_its_captions_and_other_columns_are_kept(tmp_path):
    for name in ("a.wav", "b.wav"):
        sound(tmp_path / "audio" / name)
    rows = [
        ("audio/b.wav", "one", "120"),
        ("audio/a.wav", "two, with comma", ""),
        ("audio/b.wav", "three", "97"),
    ]
    table(tmp_path / "metadata.csv", ("file_name", "caption", "bpm"), rows)
    b, a = folder_clips(tmp_path, csv="metadata.csv")
    assert (
        b.path == tmp_path / "audio" / "b.wav"
        and b.captions == ("one", "three")
        and b.extra == {"bpm": "120"}
    )
    assert a.captions == ("two, with comma",) and a.extra == {"bpm": ""}
    assert a.info == AudioInfo(8000, 800, 1)


def test_columns_may_have_other_names_and_the_file_a_byte_order_mark(tmp_path):
    sound(tmp_path / "a.wav")
    (tmp_path / "x.csv").write_text("\ufefffile,text\na.wav,chant d’été\n", encoding="utf-8")
    (clip,) = folder_clips(tmp_path, csv="x.csv", file_column="file", caption_column="text")
    assert clip.captions == ("chant d’été",)


@pytest.mark.parametrize(
    "text,message",
    [
        (None, "metadata.csv: no such file, expected a CSV with the columns file_name,caption"),
        ("", "no column file_name,caption; found nothing"),
        ("file,caption\na.wav,x\n", "no column file_name; found file,caption"),
        ("file_name,caption\n", "no rows below its header file_name,caption"),
        ("file_name,caption\na.wav,x\nb.wav,y\n", "line 3: .*b.wav: no such file"),
        ("file_name,caption\na.wav,x\nempty.wav,y\n", "line 3: .*empty.wav: not a readable audio file"),
        ("file_name,caption\na.wav,x\na.wav,  \n", "line 3: empty caption of a.wav"),
        ("file_name,caption\n,x\n", "line 2: empty file_name"),
        ("file_name,caption\na.wav\n", "line 2: expected the 2 fields file_name,caption"),
        ("file_name,caption\na.wav,a dog, barking\n", "line 2: expected the 2 fields file_name,caption"),
        ('file_name,caption\na.wav,x\na.wav,"a dog"s bark\n', "line 3: not a CSV"),
        ('file_name,caption\na.wav,x\na.wav,"a dog\n', "line 3: not a CSV"),
        (b"file_name,caption\na.wav,\xe9t\xe9\n", "not a UTF-8 text file"),
    ],
)
def test_every_mistake_in_a_folder_is_one_line_that_names_it(tmp_path, text, message):
    sound(tmp_path / "a.wav")
    (tmp_path / "empty.wav").touch()
    if text is not None:
        (tmp_path / "metadata.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=message) as caught:
        folder_clips(tmp_path, csv="metadata.csv")
    assert str(tmp_path / "metadata.csv") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("num_bad", [1, 2])
def test_a_few_bad_files_of_a_folder_are_left_out_and_listed_and_more_are_an_error(num_bad, tmp_path, caplog):
    names = [f"{i:02d}.wav" for i in range(20)]
    for name in names[num_bad:]:
        sound(tmp_path / name)
    (tmp_path / names[0]).write_text("no sound")
    (tmp_path / "x.csv").write_text("file_name,caption\n" + "".join(f"{name},a hum\n" for name in names))
    report = tmp_path / "left_out.json"
    if num_bad == 2:
        with pytest.raises(InputError, match=r"line 2: .*00\.wav: not a.* \(and 1 more of 20 files\)"):
            folder_clips(tmp_path, csv="x.csv", report=report)
        assert not report.exists()
        return
    assert [clip.path.name for clip in folder_clips(tmp_path, csv="x.csv", report=report)] == names[1:]
    (entry,) = json.loads(report.read_text())
    assert entry["clip"] == "00.wav" and "not a readable audio file" in entry["reason"]
    assert "1 of 20 files are left out, the first:" in caplog.text and "left_out.json" in caplog.text


def test_an_absent_and_an_empty_folder_are_told_apart(tmp_path):
    with pytest.raises(InputError, match="absent: no such folder"):
        folder_clips(tmp_path / "absent", csv="metadata.csv")
    with pytest.raises(InputError, match=r"the folder is empty, expected metadata.csv"):
        folder_clips(tmp_path, csv="metadata.csv")


def test_audiocaps_keeps_what_is_there_and_reports_the_rest(tmp_path, audiocaps, caplog):
    report = tmp_path / "reports" / "train.json"
    water, dog = audiocaps_clips(*audiocaps, patterns=AUDIOCAPS_PATTERNS, report=report)
    assert water.path.name == "r1nicOVtvkQ_130.wav" and water.captions == (CAPTIONS[0][3], "Water is poured")
    assert water.extra == {"audiocap_id": "91139", "youtube_id": "r1nicOVtvkQ", "start_time": "130"}
    assert dog.path.name == "Y-id_two.wav" and dog.captions == ("a dog",)
    told = json.loads(report.read_text())
    assert (told["rows"], told["clips"], told["captions"]) == (7, 2, 3)
    assert told["hours"] == pytest.approx(0.3 / 3600)
    assert told["missing"] == ["gone_20"] and told["empty_captions"] == ["line 8: -id_two_0"]
    (unreadable,) = told["unreadable"]
    assert unreadable["clip"] == "broken_20" and "not a readable audio file" in unreadable["reason"]
    expected = "2 usable clips of 7 rows (1 clips missing, 1 unreadable, 1 empty captions)"
    assert expected in caplog.text and os.listdir(report.parent) == ["train.json"]


def test_what_is_missing_is_told_without_a_report_too(audiocaps, caplog):
    audiocaps_clips(*audiocaps, patterns=AUDIOCAPS_PATTERNS, report=None)
    assert "1 clips missing" in caplog.text


def test_the_pattern_of_audiocaps_files_is_free(audiocaps):
    csv_path, root = audiocaps
    sound(root / "91139.wav")
    (clip,) = audiocaps_clips(csv_path, root, patterns=["{audiocap_id}"], report=None)
    assert clip.path.name == "91139.wav"
    with pytest.raises(InputError, match=r"'\{youtube\}': no column youtube; found audiocap_id,youtube_id"):
        audiocaps_clips(csv_path, root, patterns=["{youtube}"], report=None)
    for pattern in ("{youtube_id", "{}"):
        with pytest.raises(InputError, match="pattern"):
            audiocaps_clips(csv_path, root, patterns=[pattern], report=None)
    with pytest.raises(InputError, match="at least one"):
        audiocaps_clips(csv_path, root, patterns=[], report=None)


def test_a_readable_format_is_preferred_to_an_unreadable_one(audiocaps):
    csv_path, root = audiocaps
    for suffix in (".m4a", ".WAV", ".mp4"):
        (root / f"gone_20{suffix}").touch()
    sound(root / "gone_20.WAV")
    clips = audiocaps_clips(csv_path, root, patterns=AUDIOCAPS_PATTERNS, report=None)
    assert [clip.path.name for clip in clips][-1] == "gone_20.WAV"


def test_a_folder_csv_is_no_audiocaps_csv(tmp_path):
    other = table(tmp_path / "x.csv", ("file_name", "caption"), [("a.wav", "x")])
    with pytest.raises(
        InputError, match="no column audiocap_id,youtube_id,start_time; found file_name,caption"
    ):
        audiocaps_clips(other, tmp_path, patterns=AUDIOCAPS_PATTERNS, report=None)


def test_an_absent_audio_folder_is_named(audiocaps):
    with pytest.raises(InputError, match="absent: no such folder, expected AudioCaps' audio files"):
        audiocaps_clips(audiocaps[0], audiocaps[1] / "absent", patterns=AUDIOCAPS_PATTERNS, report=None)


@real_data
def test_audiocaps_without_audio_is_an_error_that_leaves_its_report(tmp_path):
    root, report = tmp_path / "audio", tmp_path / "report.json"
    root.mkdir()
    with pytest.raises(InputError, match=r"0 usable clips of 2475 rows \(495 clips missing, 0 unreadable"):
        audiocaps_clips(Path(DATA, "audiocaps/val.csv"), root, patterns=AUDIOCAPS_PATTERNS, report=report)
    told = json.loads(report.read_text())
    assert told["clips"] == 0 and len(told["missing"]) == 495 and "vfY_TJq7n_U_130" in told["missing"]
