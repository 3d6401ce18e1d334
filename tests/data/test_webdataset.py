"""Tars of clips, local and remote: read by offset, exact from any step, broken members named."""

import io
import json
import logging
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import ClassVar

import numpy as np
import pytest
import soundfile
import torch

from ldm_audio.data import remote, webdataset
from ldm_audio.data.loader import ItemKey, StepBatches, Unreadable, make_loader
from ldm_audio.data.remote import expand
from ldm_audio.data.webdataset import TarClips, captions_of, index_tar, remote_index_name
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


def data(path: Path | str, **changes) -> TarClips:
    settings = {
        "sample_rate": RATE, "num_samples": 400, "seed": 0, "normalise": "none", "random_crop": True,
        "caption": "random", "channel": "mix", "template": "The sounds of {}", "index_folder": "nowhere",
    }  # fmt: skip
    return TarClips(path, **settings | changes)


@pytest.mark.parametrize("name, value", [("channel", "left"), ("caption", "last"), ("normalise", "peak")])
def test_settings_that_do_not_exist_are_refused_as_for_a_folder(name, value, tars):
    with pytest.raises(InputError, match=f"{name}='{value}': expected"):
        data(tars, **{name: value})


def test_a_silent_part_of_a_long_clip_is_not_taken(tmp_path):
    waveform = np.zeros(4000, np.float32)
    waveform[2000:] = 0.5
    buffer = io.BytesIO()
    soundfile.write(buffer, waveform, RATE, format="FLAC")
    write_tar(tmp_path / "0.tar", clip("a", 0.1) | {"a.flac": buffer.getvalue()})
    found = data(tmp_path)
    assert all(found[ItemKey(epoch, 0, epoch)]["waveform"].abs().max() > 0.4 for epoch in range(20))


def batches(
    found: TarClips, start: int, steps: int, size: int = 2, rank: int = 0, world: int = 1, workers: int = 0
) -> list[dict]:
    keys = StepBatches(
        5, batch_size=size, seed=0, start_step=start, num_steps=steps, rank=rank, world_size=world
    )
    return list(make_loader(found, keys, num_workers=workers))


def assert_exact_from_any_step_and_on_any_rank(found: TarClips) -> None:
    whole = batches(found, 0, 6)
    for part in (batches(found, 3, 3), batches(found, 3, 3, workers=2)):
        assert all(torch.equal(a["waveform"], b["waveform"]) for a, b in zip(whole[3:], part, strict=True))
    ranks = batches(found, 0, 6, 1, 0, 2), batches(found, 0, 6, 1, 1, 2)
    for step in range(6):
        assert whole[step]["caption"] == ranks[0][step]["caption"] + ranks[1][step]["caption"]
    assert {c for step in whole[:3] for c in step["caption"]} == {f"sound {k}" for k in "abcde"}


def test_every_clip_of_every_tar_is_an_item(tars):
    found = data(tars)
    levels = [round(found[i]["waveform"].mean().item(), 3) for i in range(len(found))]
    assert levels == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [found[i]["caption"] for i in range(5)] == found.captions() == [f"sound {k}" for k in "abcde"]
    assert found[0]["waveform"].shape == (400,) and len(data(tars / "0.tar")) == 2


def test_the_index_is_read_instead_of_the_tar_until_that_changes(tars, monkeypatch):
    def index():
        return index_tar(tars / "0.tar", Path("nowhere"))

    first = index()
    with monkeypatch.context() as patched:
        patched.setattr(webdataset, "scan_tar", lambda path: pytest.fail("read through again"))
        assert index() == first
    write_tar(tars / "0.tar", clip("z", 0.7))
    assert [member.key for member in index().members] == ["z"]
    for content in ("{", "[]", json.dumps({"tar": [1]})):
        (tars / "0.tar.index.json").write_text(content)
        assert [member.key for member in index().members] == ["z"]


def test_training_goes_on_at_any_step_with_the_same_items_on_any_number_of_ranks(tars):
    assert_exact_from_any_step_and_on_any_rank(data(tars))


def test_captions_come_from_text_and_augmented_text_and_else_from_labels():
    def of(**described) -> list[str]:
        return captions_of(described, template="The sounds of {}")

    assert of(text="a dog") == ["a dog"]
    assert of(text=["a dog", " "], text_augment_t5="a dog barks", tag=["dog"]) == ["a dog", "a dog barks"]
    assert of(tag=["A", "B", "C"]) == ["The sounds of A, B and C"] and of(tag=["A"]) == ["The sounds of A"]
    assert of(tag="dog") == ["The sounds of dog"]
    assert of(text="", tag=[]) == of() == of(text=None, tag=None) == of(text=5, tag=[1, None]) == []


def test_the_caption_changes_by_epoch_and_not_by_worker(tars):
    write_tar(tars / "0.tar", clip("a", 0.1, text=["one", "two", "three"]))
    seen = [data(tars / "0.tar")[ItemKey(epoch, 0, 0)]["caption"] for epoch in range(20)]
    assert set(seen) == {"one", "two", "three"}
    assert seen == [data(tars / "0.tar")[ItemKey(epoch, 0, 7)]["caption"] for epoch in range(20)]
    assert data(tars / "0.tar", caption="first")[ItemKey(5, 0, 0)]["caption"] == "one"


def test_a_broken_sound_is_named_and_replaced_by_the_loader(tars, tmp_path):
    members = clip("a", 0.1) | clip("b", 0.2) | clip("c", 0.3)
    members["b.flac"] = b"no sound"
    found = data(write_tar(tars / "0.tar", members))
    with pytest.raises(InputError, match=r"0\.tar: b: broken audio"):
        found[1]
    keys = [[ItemKey(0, index, index) for index in range(3)]]
    unreadable = Unreadable(tmp_path / "unreadable.json")
    (batch,) = make_loader(found, keys, num_workers=0, unreadable=unreadable)
    assert batch["caption"][0] == "sound a" and batch["caption"][2] == "sound c"
    assert set(batch["caption"]) == {"sound a", "sound c"} and sorted(unreadable.clips) == [1]


def test_clips_without_sound_or_words_are_counted_named_and_left_out(tars, caplog):
    members = clip("a", 0.1) | clip("b", 0.2) | clip("c", 0.3, text=None) | clip("d", 0.4) | clip("e", 0.5)
    members["b.json"] = b"no JSON"
    del members["d.json"], members["e.flac"]
    write_tar(tars / "0.tar", members)
    told = (
        "0.tar: 4 clips left out: b (its JSON cannot be read), c (its JSON has neither text nor tag), "
        "d (no JSON), e (no sound)"
    )
    for _ in range(2):  # scanned, and from the index
        caplog.clear()
        assert data(tars / "0.tar").captions() == ["sound a"]
        (line,) = (record.message for record in caplog.records)
        assert line.endswith(told)


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


class Ranges(SimpleHTTPRequestHandler):
    """Serves a folder as storage does: parts of files too. Some answers can be made to fail."""

    failing: ClassVar[list[int]] = []  # what the next requests are answered with; 0 cuts the answer short
    asked: ClassVar[list[str | None]] = []  # the Range of each request

    def do_GET(self) -> None:
        self.asked.append(self.headers.get("Range"))
        status = self.failing.pop(0) if self.failing else 200
        if status > 200:
            return self.send_error(status)
        path = Path(self.translate_path(self.path))
        content = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        part = content[int(found[1]) : int(found[2]) + 1] if found else content
        self.send_response(206 if found else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", str(path.stat().st_mtime_ns))
        self.end_headers()
        self.wfile.write(part if status == 200 else part[: len(part) // 2])

    def log_message(self, *told) -> None:
        pass


@pytest.fixture
def served(tars, monkeypatch) -> Iterator[str]:
    """The address of a server with `0.tar` and `1.tar`."""
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    monkeypatch.setattr(Ranges, "asked", [])
    (tars / "more" / "1.tar").rename(tars / "1.tar")
    with serving(tars, Ranges) as address:
        yield address


@contextmanager
def serving(folder: Path, handler: type) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(folder)))
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_remote_tars_give_what_local_ones_give_by_one_request_a_clip(served, tars, tmp_path):
    here, there = data(tars), data(f"{served}/{{0..1}}.tar", index_folder=tmp_path / "indices")
    assert len(list((tmp_path / "indices").glob("*.index.json"))) == 2
    assert there.captions() == here.captions()
    Ranges.asked.clear()
    for key in (ItemKey(epoch, index, 0) for epoch in range(2) for index in range(5)):
        one, other = here[key], there[key]
        assert torch.equal(one["waveform"], other["waveform"]) and one["caption"] == other["caption"]
    assert len(Ranges.asked) == 10 and all(Ranges.asked)
    again = data(f"{served}/{{0..1}}.tar", index_folder=tmp_path / "indices")
    assert again.places == there.places
    assert len(Ranges.asked) == 12  # what the tars are now, and no more


def test_remote_tars_are_resumed_and_shared_out_as_local_ones_are(served, tmp_path):
    assert_exact_from_any_step_and_on_any_rank(data(f"{served}/{{0..1}}.tar", index_folder=tmp_path / "at"))


def test_a_remote_tar_that_changed_is_read_through_again(served, tars, tmp_path):
    assert len(data(f"{served}/0.tar", index_folder=tmp_path / "at")) == 2
    write_tar(tars / "0.tar", clip("z", 0.7) | clip("y", 0.1, text="long" * 200) | clip("x", 0.2))
    assert len(data(f"{served}/0.tar?signed=anew", index_folder=tmp_path / "at")) == 3
    assert len(list((tmp_path / "at").iterdir())) == 1


def test_what_fails_for_a_moment_is_asked_for_again(served, tars, tmp_path, monkeypatch):
    for failing in (
        [503, 503],
        [200, 0, 0],
        [500, 200, 0],
    ):
        monkeypatch.setattr(Ranges, "failing", list(failing))
        found = data(f"{served}/1.tar", index_folder=tmp_path / str(failing))
        assert len(found) == 3 and not Ranges.failing
    monkeypatch.setattr(Ranges, "failing", [502, 0])
    assert torch.equal(found[1]["waveform"], data(tars / "1.tar")[1]["waveform"])


def test_addresses_that_give_nothing_are_named_in_one_line(served, tmp_path, monkeypatch):
    at = {"index_folder": tmp_path / "at"}
    with pytest.raises(InputError, match=r"/9\.tar: not to be had from its server \(404 Not Found\)"):
        monkeypatch.setattr(Ranges, "failing", [404])
        data(f"{served}/9.tar", **at)
    found = data(f"{served}/0.tar", **at)
    monkeypatch.setattr(Ranges, "failing", [503] * 3)
    with pytest.raises(InputError, match=r"/0\.tar: not to be had from its server \(503 "):
        found[0]
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9/0\.tar: not to be had .*refused"):
        data("http://127.0.0.1:9/0.tar", **at)
    with pytest.raises(InputError, match=r"stands for no address, expected {FIRST\.\.LAST}"):
        data(f"{served}/{{2..1}}.tar", **at)
    with pytest.raises(InputError, match="nor an http"):
        data("pipe:curl http://x/0.tar", **at)


def test_a_server_that_sends_whole_files_is_read_up_to_the_clip(tars, tmp_path, caplog):
    class Plain(SimpleHTTPRequestHandler):
        def log_message(self, *told) -> None:
            pass

    here = data(tars / "more")
    with serving(tars / "more", Plain) as address:
        there = data(f"{address}/1.tar", index_folder=tmp_path / "at")
        assert all(torch.equal(there[i]["waveform"], here[i]["waveform"]) for i in range(3))
    (told,) = (record.message for record in caplog.records)
    assert "ignores Range headers" in told


def test_names_of_addresses():
    assert expand("http://h/{08..11}/{1..2}.tar")[:3] == [
        f"http://h/{p}.tar" for p in ("08/1", "08/2", "09/1")
    ]
    assert len(expand("http://h/{08..11}/{1..2}.tar")) == 8 and expand("http://h/a.tar") == ["http://h/a.tar"]
    assert remote_index_name("http://h/a/0.tar?x=1") == remote_index_name("http://h/a/0.tar?x=2")
    assert remote_index_name("http://h/a/0.tar") != remote_index_name("http://h/b/0.tar")
