"""Tars of clips: indexed by offset, exact from any step, captions by epoch, broken members named."""

import io
import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from ldm_audio.data import webdataset
from ldm_audio.data.loader import ItemKey, StepBatches, Unreadable, make_loader
from ldm_audio.data.webdataset import TarClips, captions_of, index_tar
from ldm_audio.errors import InputError

RATE = 8000


def sound(level: float, seconds: float = 0.5, rate: int = RATE) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.full(round(seconds * rate), level), rate, format="FLAC", subtype="PCM_24")
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def clip(key: str, level: float, **described) -> dict[str, bytes]:
    text = {"text": f"sound {key}"} | described
    return {f"{key}.flac": sound(level), f"{key}.json": json.dumps(text).encode()}


@pytest.fixture
def tars(tmp_path) -> Path:
    write_tar(tmp_path / "0.tar", clip("a", 0.1) | clip("b", 0.2))
    write_tar(tmp_path / "more" / "1.tar", clip("c", 0.3) | clip("d", 0.4) | clip("e", 0.5))
    return tmp_path


def data(path: Path, **changes) -> TarClips:
    settings = {
        "sample_rate": RATE, "num_samples": 400, "seed": 0, "normalise": "none", "random_crop": True,
        "caption": "random", "channel": "mix", "template": "The sounds of {}",
    }  # fmt: skip
    return TarClips(path, **settings | changes)


def test_every_clip_of_every_tar_is_an_item(tars):
    found = data(tars)
    levels = [round(found[i]["waveform"].mean().item(), 3) for i in range(len(found))]
    assert levels == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [found[i]["caption"] for i in range(5)] == found.captions() == [f"sound {k}" for k in "abcde"]
    assert found[0]["waveform"].shape == (400,) and len(data(tars / "0.tar")) == 2


def test_the_index_is_read_instead_of_the_tar_until_that_changes(tars, monkeypatch):
    first = index_tar(tars / "0.tar")
    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "scan_tar", lambda path: pytest.fail("read through again"))
        assert index_tar(tars / "0.tar") == first
    write_tar(tars / "0.tar", clip("z", 0.7))
    assert [member.key for member in index_tar(tars / "0.tar")] == ["z"]
    (tars / "0.tar.index.json").write_text("{")
    assert [member.key for member in index_tar(tars / "0.tar")] == ["z"]


def test_training_goes_on_at_any_step_with_the_same_items_on_any_number_of_ranks(tars):
    found = data(tars)

    def batches(
        start: int, steps: int, size: int = 2, rank: int = 0, world: int = 1, workers: int = 0
    ) -> list[dict]:
        keys = StepBatches(
            5, batch_size=size, seed=0, start_step=start, num_steps=steps, rank=rank, world_size=world
        )
        return list(make_loader(found, keys, num_workers=workers))

    whole = batches(0, 6)
    for part in (batches(3, 3), batches(3, 3, workers=2)):
        assert all(torch.equal(a["waveform"], b["waveform"]) for a, b in zip(whole[3:], part, strict=True))
    ranks = batches(0, 6, 1, 0, 2), batches(0, 6, 1, 1, 2)
    for step in range(6):
        assert whole[step]["caption"] == ranks[0][step]["caption"] + ranks[1][step]["caption"]
    assert {c for step in whole[:3] for c in step["caption"]} == {f"sound {k}" for k in "abcde"}


def test_captions_come_from_text_and_augmented_text_and_else_from_labels():
    def of(**described) -> list[str]:
        return captions_of(described, template="The sounds of {}")

    assert of(text="a dog") == ["a dog"]
    assert of(text=["a dog", " "], text_augment_t5="a dog barks", tag=["dog"]) == ["a dog", "a dog barks"]
    assert of(tag=["A", "B", "C"]) == ["The sounds of A, B and C"] and of(tag=["A"]) == ["The sounds of A"]
    assert of(text="", tag=[]) == of() == of(text=None, tag=None) == []


def test_the_caption_changes_by_epoch_and_not_by_worker(tars):
    write_tar(tars / "0.tar", clip("a", 0.1, text=["one", "two", "three"]))
    seen = [data(tars / "0.tar")[ItemKey(epoch, 0, 0)]["caption"] for epoch in range(20)]
    assert set(seen) == {"one", "two", "three"}
    assert seen == [data(tars / "0.tar")[ItemKey(epoch, 0, 7)]["caption"] for epoch in range(20)]
    assert data(tars / "0.tar", caption="first")[ItemKey(5, 0, 0)]["caption"] == "one"


def test_a_broken_member_is_named_and_replaced_by_the_loader(tars, tmp_path, caplog):
    members = clip("a", 0.1) | clip("b", 0.2) | clip("c", 0.3) | clip("d", 0.4)
    members["b.flac"] = b"no sound"
    members["d.json"] = b"no JSON"
    found = data(write_tar(tars / "0.tar", members))
    with pytest.raises(InputError, match=r"0\.tar: b: broken audio"):
        found[1]
    with pytest.raises(InputError, match=r"0\.tar: d\.json: not JSON"):
        found[3]
    with caplog.at_level(logging.WARNING):
        assert found.captions() == ["sound a", "sound b", "sound c"]
        (told,) = (record.message for record in caplog.records)
    assert "0.tar: d.json: not JSON; its captions are left out" in told
    keys = [[ItemKey(0, index, index) for index in range(4)]]
    unreadable = Unreadable(tmp_path / "unreadable.json")
    (batch,) = make_loader(found, keys, num_workers=0, unreadable=unreadable)
    assert batch["caption"][0] == "sound a" and batch["caption"][2] == "sound c"
    assert set(batch["caption"]) == {"sound a", "sound c"} and sorted(unreadable.clips) == [1, 3]


def test_a_tar_cut_short_keeps_its_whole_members_and_one_without_any_is_refused(tars, caplog):
    path = tars / "more" / "1.tar"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        found = data(path)
    assert 1 <= len(found) < 3 and found[0]["caption"] == "sound c"
    assert any("1.tar" in record.message for record in caplog.records)
    path.write_bytes(b"no tar at all" * 100)
    with pytest.raises(InputError, match=r"1\.tar: not a readable tar file"):
        data(path)
    write_tar(path, {"a.flac": sound(0.1), "b.json": b"{}"})
    with pytest.raises(InputError, match="no clips in its 1 tar files"):
        data(path)
    with pytest.raises(InputError, match="no such tar file, nor a folder with some"):
        data(tars / "nothing")
