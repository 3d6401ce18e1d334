"""Mixed items: in time, the same on every worker, and the anchor where nothing is mixed."""

import csv
import os
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import toys

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.io import probe, resample, write_wav
from ldm_audio.audio.mixup import Mixup
from ldm_audio.data.clips import Clips, folder, peak_half
from ldm_audio.data.loader import ItemKey, StepBatches, make_loader
from ldm_audio.data.manifest import Clip
from ldm_audio.data.mixing import Mixed
from ldm_audio.data.synthetic_tracks import synthetic_tracks
from ldm_audio.errors import InputError

DATA = os.environ.get("LDM_AUDIO_DATA")
RATE = 16000
WINDOW = 40960


def tracks(mixup: Mixup, **changes):
    settings = {
        "sample_rate": RATE, "num_samples": WINDOW, "track_samples": 2 * WINDOW, "size": 40, "seed": 0,
        "split": "train", "kinds": ["sound", "beat"],
    }  # fmt: skip
    return synthetic_tracks(mixup=mixup, **settings | changes)


def onset(waveform: np.ndarray) -> np.ndarray:
    """(s,) -> rise of the level in steps of 1 ms."""
    level = np.sqrt(np.convolve(waveform**2, np.full(64, 1 / 64), "same")[:: RATE // 1000])
    return np.maximum(np.diff(level, prepend=0), 0)


def lag_of(one: np.ndarray, other: np.ndarray, reach: int = 60) -> int:
    """Milliseconds by which `other` comes after `one`, where their onsets agree best."""
    one, other = onset(one), onset(other)
    pad = np.pad(other, reach)
    return int(np.argmax([one @ pad[k : k + len(one)] for k in range(2 * reach + 1)])) - reach


def recordings(folder: Path, waveforms: list[tuple[np.ndarray, int]], beats: list[Beats], **changes) -> Mixed:
    """waveforms: with the rate of each."""
    paths = [folder / f"{number}.wav" for number in range(len(waveforms))]
    for path, (waveform, rate) in zip(paths, waveforms):
        write_wav(path, waveform, rate, subtype="FLOAT")
    clips = Clips(
        [Clip(path, (path.stem,), probe(path)) for path in paths],
        sample_rate=RATE, num_samples=WINDOW, seed=0, normalise="none", random_crop=True, caption="first",
        channel="mix", beats=beats,
    )  # fmt: skip
    return Mixed(clips, toys.mixup(**changes))


def test_rendered_parents_start_their_bars_together():
    """Checked on the sound itself: the kick at the beginning of both, within 10 ms."""
    data = tracks(toys.mixup(space="latent"), kinds=["beat"])
    checked = 0
    for index in range(24):
        item = data[ItemKey(1, index, index)]
        if item["mix_ratio"] == 1:
            continue
        first = [item[name][: round(0.25 * RATE)].numpy() for name in ("waveform", "partner")]
        assert abs(lag_of(*first)) <= 10
        assert all(onset(waveform)[:40].argmax() <= 10 for waveform in first)
        checked += 1
    assert checked >= 15


def test_a_mix_is_lambda_of_one_and_the_rest_of_the_other(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.uniform(-0.5, 0.5, (2, 4 * WINDOW)).astype(np.float32)
    beats = [
        Beats((0.5, 1.0, 1.5), (0.5, 1.5), 4 * WINDOW / RATE),
        Beats((0.25, 0.75), (0.25,), 4 * WINDOW / RATE),
    ]
    data = recordings(tmp_path, [(waveform, RATE) for waveform in noise], beats)
    for epoch in range(6):
        mix, item = data.plan(ItemKey(epoch, 0, 0)), data[ItemKey(epoch, 0, 0)]
        start, other = round(mix.start * RATE), round(mix.partner_start * RATE)
        expected = mix.ratio * noise[0][start:][:WINDOW] + (1 - mix.ratio) * noise[1][other:][:WINDOW]
        assert np.abs(item["waveform"].numpy() - expected).max() < 1e-6
        assert (item["caption"], item["partner_caption"], item["mix_ratio"]) == (
            "0",
            "1",
            pytest.approx(mix.ratio),
        )


def test_recordings_at_other_rates_are_aligned_within_a_sample(tmp_path):
    """Clicks at the downbeats of 44.1 kHz recordings come out at the beginning of both parents."""
    times = [0.4, 1.4, 2.4], [0.7, 1.7, 2.7]
    waveforms, beats = [], []
    for downbeats in times:
        waveform = np.zeros(44100 * 8, np.float32)
        waveform[np.round(np.array(downbeats) * 44100).astype(int)] = 0.5
        waveforms.append((waveform, 44100))
        beats.append(Beats(tuple(downbeats), tuple(downbeats), 8.0))
    data = recordings(tmp_path, waveforms, beats, space="latent")
    for epoch in range(5):
        item = data[ItemKey(epoch, 0, 0)]
        assert item["waveform"].abs()[:8000].argmax() <= 1 and item["partner"].abs()[:8000].argmax() <= 1


def test_levels_are_even_where_they_are_to_be(tmp_path):
    seconds = 4 * WINDOW / RATE
    loud, soft = (gain * np.random.default_rng(1).uniform(-1, 1, 4 * WINDOW) for gain in (0.9, 0.01))
    beats = [Beats((0.5, 1.0), (0.5,), seconds)] * 2
    data = recordings(
        tmp_path, [(sound.astype(np.float32), RATE) for sound in (loud, soft)], beats, premix="peak"
    )
    data.source.normalise = "peak_half"
    item, mix = data[ItemKey(0, 0, 0)], data.plan(ItemKey(0, 0, 0))
    cut = slice(RATE // 2, RATE // 2 + WINDOW)
    expected = peak_half(mix.ratio * peak_half(loud[cut]) + (1 - mix.ratio) * peak_half(soft[cut]))
    assert np.abs(item["waveform"].numpy() - expected).max() < 1e-3
    assert item["waveform"].abs().max() == pytest.approx(0.5, abs=1e-4)


def test_what_has_no_beats_is_not_mixed():
    plain, mixed = tracks(toys.mixup(prob=0.0)), tracks(toys.mixup(space="latent"))
    sounds = [index for index in range(40) if plain.attributes(index)["kind"] == "sound"]
    assert len(sounds) > 10
    for index in sounds:
        item = mixed[ItemKey(2, index, 5)]
        assert item["mix_ratio"] == 1 and item["partner_caption"] == "" and not item["partner"].any()
        assert torch.equal(item["waveform"], plain[ItemKey(2, index, 5)]["waveform"])


def test_partners_have_the_anchors_tempo_or_any_as_asked():
    same, any_tempo = tracks(toys.mixup()), tracks(toys.mixup(tempo_width=None))
    tempos = same.source.tempos()
    pairs = [(tempos[i], data.plan(ItemKey(0, i, 0))) for data in (same, any_tempo) for i in range(40)]
    found = [[t == tempos[mix.partner] for t, mix in half if mix] for half in (pairs[:40], pairs[40:])]
    assert found[0] and all(found[0]) and not all(found[1])


def test_the_same_mixes_come_from_any_number_of_workers_and_ranks():
    def batches(rank: int, world: int, size: int, workers: int) -> list[dict]:
        data = tracks(toys.mixup(prob=0.7), kinds=["beat"], size=40)
        steps = StepBatches(
            40, batch_size=size, seed=0, start_step=0, num_steps=4, rank=rank, world_size=world
        )
        return list(islice(make_loader(data, steps, num_workers=workers), 4))

    alone = batches(0, 1, 4, 0)
    worker = batches(0, 1, 4, 2)
    ranks = batches(0, 2, 2, 0), batches(1, 2, 2, 0)
    for step in range(4):
        for name in ("waveform", "mix_ratio", "item"):
            assert torch.equal(alone[step][name], worker[step][name])
            assert torch.equal(alone[step][name], torch.cat([half[step][name] for half in ranks]))
        assert alone[step]["caption"] == ranks[0][step]["caption"] + ranks[1][step]["caption"]
    assert any((step["mix_ratio"] < 1).any() for step in alone)


def test_a_folder_is_mixed_by_its_table_of_beats(tmp_path, command):
    settings = {
        "sample_rate": RATE, "num_samples": WINDOW, "seed": 0, "normalise": "peak_half", "random_crop": True,
        "caption": "random", "channel": "mix",
    }  # fmt: skip
    for number in range(2):
        write_wav(tmp_path / f"{number}.wav", np.random.default_rng(number).uniform(-1, 1, 8 * RATE), RATE)
        beats = "".join(f"{0.5 * i:.2f}\t{i % 4 + 1}\n" for i in range(16))
        (tmp_path / f"{number}.beats").write_text(beats)
    (tmp_path / "metadata.csv").write_text("file_name,caption\n0.wav,a bell\n1.wav,a drum\n")
    with pytest.raises(InputError, match=r"beats\.jsonl: no such file; make it with `ldm-audio beats"):
        folder(tmp_path, mixup=toys.mixup(), **settings)
    assert command("ldm_audio.cli", "beats", tmp_path, "--tracker", "files", "--files", tmp_path) == 0
    data = folder(tmp_path, mixup=toys.mixup(), **settings)
    assert data.plan(0).start % 2.0 == 0 and data[0]["mix_ratio"] < 1
    assert isinstance(folder(tmp_path, mixup=toys.mixup(prob=0.0), **settings), Clips)
    (tmp_path / "beats.jsonl").unlink()
    assert folder(tmp_path, mixup=toys.mixup(align="none", tempo_width=None), **settings)[0]["mix_ratio"] < 1


@pytest.mark.skipif(DATA is None, reason="LDM_AUDIO_DATA is unset: no real recordings")
def test_real_loops_start_their_bars_together(tmp_path):
    """Loops of known tempo, each repeated behind a silence of its own: where a mix begins with one of their
    bars, its onsets agree best with those of the loop from that bar on, within 10 ms in both parents."""
    with Path(f"{DATA}/soundbank/train.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["beats"] and int(row["beats"]) % 4 == 0]
    assert len(rows) >= 16
    loops, waveforms, beats, leads = [], [], [], np.random.default_rng(0).uniform(0.1, 0.9, len(rows))
    for row, lead in zip(rows, leads):
        source, rate = soundfile.read(f"{DATA}/soundbank/{row['file_name']}", always_2d=True)
        loop, count = source.mean(axis=1), int(row["beats"])
        repeats = -(-8 * rate // len(loop))
        waveform = np.concatenate([np.zeros(round(lead * rate)), np.tile(loop, repeats)]).astype(np.float32)
        times = lead + np.arange(repeats * count) * (len(loop) / rate / count)
        loops.append((resample(np.tile(loop, 2), rate, RATE), len(loop) / rate))
        waveforms.append((waveform, rate))
        beats.append(Beats(tuple(times), tuple(times[::4]), len(waveform) / rate))
    data = recordings(tmp_path, waveforms, beats, space="latent", tempo_width=None)
    for index in range(len(rows)):
        mix, item = data.plan(ItemKey(3, index, 0)), data[ItemKey(3, index, 0)]
        for track, start, name in (
            (index, mix.start, "waveform"), (mix.partner, mix.partner_start, "partner")
        ):  # fmt: skip
            loop, period = loops[track]
            bar = round((start - leads[track]) % period * RATE)
            lag = lag_of(loop[bar:][:RATE], item[name][:RATE].numpy())
            assert abs(lag) <= 10, (rows[track]["file_name"], start, lag)
