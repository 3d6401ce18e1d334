import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from ldm_audio.audio.io import read_audio
from ldm_audio.errors import InputError
from ldm_audio.pipelines import samples
from ldm_audio.pipelines.samples import SampleFolder, slug

NASTY = '<script>alert("x")</script> & $x^{$ 犬 \n\t end'
WAVES = 0.5 * torch.sin(torch.arange(1600) * torch.tensor([[0.1], [0.3], [0.5]]))


@pytest.fixture(autouse=True)
def quick_pictures(monkeypatch):
    """Pictures have tests of their own."""
    monkeypatch.setattr(samples, "mel_sheet", lambda path, mels, titles, *, mel: path.write_bytes(b"png"))


def fill(folder, indices, *, prompt="a dog, barking!", **settings):
    """A folder with one sound for each of these prompts."""
    into = SampleFolder(folder, mel=toys.mel(), **{"total": 3} | settings)
    for index in indices:
        into.add(
            [{"index": index, "rank": 0, "prompt": prompt}],
            WAVES[index : index + 1],
            toys.mel()(WAVES[:1]),
        )
    return into


def listed(folder):
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text(encoding="utf-8").splitlines()]


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def test_sounds_are_written_with_their_records_and_page(tmp_path):
    into = SampleFolder(tmp_path / "out", mel=toys.mel(), total=3)
    prompts = ["A dog, barking!", NASTY, "犬"]
    records = [{"index": i, "rank": 0, "prompt": prompt, "seed": 7} for i, prompt in enumerate(prompts)]
    into.add(records, WAVES, toys.mel()(WAVES))
    names = ["0000_a-dog-barking_0", "0001_script-alert-x-script-x-end_0", "0002_0"]
    expected = [f"{name}.{kind}" for name in names for kind in ("png", "wav")]
    assert files(tmp_path / "out") == sorted([*expected, "index.html", "samples.jsonl"])
    for name, waveform in zip(names, WAVES):
        written, rate = read_audio(tmp_path / "out" / f"{name}.wav")
        assert rate == 16000 and np.abs(written[0] - waveform.numpy()).max() < 1e-4
    assert listed(tmp_path / "out")[0] == {
        "file": "0000_a-dog-barking_0.wav",
        "picture": "0000_a-dog-barking_0.png",
        "index": 0,
        "rank": 0,
        "prompt": "A dog, barking!",
        "seed": 7,
    }
    page = (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
    assert [page.count(f'src="{name}.wav"') for name in names] == [1, 1, 1] and "<script>" not in page


def test_what_is_finished_is_listed_before_the_rest_is_made(tmp_path):
    fill(tmp_path, [2])
    assert [row["index"] for row in listed(tmp_path)] == [2]
    fill(tmp_path, [1], rank=1, world_size=2)  # another process's share
    assert [row["index"] for row in listed(tmp_path)] == [1, 2]


def test_nothing_is_overwritten_unasked(tmp_path):
    fill(tmp_path, [0, 1, 2])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(InputError, match="holds samples already: choose out=FOLDER or overwrite=true"):
        fill(tmp_path, [0])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "0000_a-dog-barking_0.wav").write_bytes(b"mine")
    with pytest.raises(InputError, match="is there already"):
        fill(tmp_path / "other", [0])
    assert (tmp_path / "other" / "0000_a-dog-barking_0.wav").read_bytes() == b"mine"


def test_overwriting_takes_the_earlier_samples_away_when_the_first_new_one_comes(tmp_path):
    fill(tmp_path, [0, 1, 2])
    SampleFolder(tmp_path, mel=toys.mel(), total=1, overwrite=True)
    assert len(listed(tmp_path)) == 3
    fill(tmp_path, [0], prompt="rain", total=1, overwrite=True)
    assert files(tmp_path) == ["0000_rain_0.png", "0000_rain_0.wav", "index.html", "samples.jsonl"]


def test_overwriting_leaves_alone_what_is_outside_the_folder(tmp_path):
    (tmp_path / "precious.wav").write_bytes(b"x")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "samples.jsonl").write_text('{"file": "../precious.wav"}\n')
    fill(tmp_path / "out", [0], overwrite=True)
    assert (tmp_path / "precious.wav").exists()


def fill_every_second(path: Path, rank: int) -> None:
    """What one of two processes does."""
    samples.mel_sheet = lambda path, *_, **__: path.write_bytes(b"png")
    folder = SampleFolder(path, mel=toys.mel(), total=40, rank=rank, world_size=2)
    for index in range(rank, 40, 2):
        row = {"index": index, "rank": 0, "prompt": "x"}
        folder.add([row], 0.1 * torch.ones(1, 800), torch.zeros(1, 16, 5))


def test_processes_that_share_a_folder_lose_nothing(tmp_path, processes):
    both = [processes.Process(target=fill_every_second, args=(tmp_path / "out", rank)) for rank in (0, 1)]
    for process in both:
        process.start()
    for process in both:
        process.join()
    assert [process.exitcode for process in both] == [0, 0]
    assert [row["index"] for row in listed(tmp_path / "out")] == list(range(40))


def test_a_list_that_is_none_is_named(tmp_path):
    (tmp_path / "samples.jsonl").write_text("oops\n")
    with pytest.raises(InputError, match=r"samples\.jsonl: not one JSON object a line"):
        SampleFolder(tmp_path, mel=toys.mel(), total=1)


def test_long_prompts_give_short_file_names():
    assert len(slug("very long " * 100)[0]) <= 48
    assert slug("../../etc/passwd") == ["etc-passwd"] and slug("???") == []
