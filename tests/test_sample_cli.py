"""`sample.py` as a command, on a system of toy networks: what it writes, and what it leaves when stopped."""

import json

import numpy as np
import pytest
import torch
import toys

from ldm_audio.audio.io import read_audio, write_wav
from ldm_audio.pipelines import requests, samples
from ldm_audio.pipelines.encode import state_hash
from ldm_audio.pipelines.text_to_audio import TextToAudio
from ldm_audio.pretrained import save_network, write_system

pytestmark = pytest.mark.filterwarnings("ignore:.*CLAP's text tower")


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """A system's folder."""
    folder, pipeline = tmp_path_factory.mktemp("system"), toys.pipeline()
    for name in ("unet", "vae", "vocoder", "clap"):
        network = getattr(pipeline, name)
        save_network(network, folder / f"{name}.safetensors", recipe=network.recipe, provenance=None)
    pipeline.tokenizer.save(folder / "tokenizer.json")
    write_system(folder, {"mel": toys.MEL, "schedule": toys.SCHEDULE, "latent_scale": 0.9})
    return folder


@pytest.fixture
def sampled(system, command, tmp_path, monkeypatch):
    """`sampled(*overrides, code=0)`: samples into `tmp_path / "out"`, returns what it lists."""
    monkeypatch.setattr(samples, "mel_sheet", lambda path, *_, **__: path.write_bytes(b"png"))

    def run(*overrides, code=0):
        out = tmp_path / "out"
        assert command("sample.py", f"weights={system}", "duration=0.2", f"out={out}", *overrides) == code
        return [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]

    return run


def test_a_stop_leaves_what_is_finished_whole_and_nothing_else(sampled, tmp_path, monkeypatch, capsys):
    add, calls = samples.SampleFolder.add, []

    def stopped_in_the_second(self, *arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        add(self, *arguments)

    monkeypatch.setattr(samples.SampleFolder, "add", stopped_in_the_second)
    (row,) = sampled("prompt=[rain,a hum,a bell]", "num_steps=2", "batch_size=1", code=130)
    assert read_audio(tmp_path / "out" / row["file"])[0].shape == (1, round(0.2 * toys.RATE))
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "samples.jsonl", "index.html", row["file"], row["picture"],
    }  # fmt: skip
    assert f"stopped: 1 sounds are in {tmp_path / 'out'}" in capsys.readouterr().err


def test_processes_of_torchrun_share_a_list(sampled, tmp_path, monkeypatch):
    prompts = "prompt=[rain,a hum,a bell]"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert [row["index"] for row in sampled(prompts, "num_steps=2")] == [1]
    monkeypatch.setenv("RANK", "0")
    shared = sampled(prompts, "num_steps=2")
    assert [row["index"] for row in shared] == [0, 1, 2]
    waveforms = [read_audio(tmp_path / "out" / row["file"])[0] for row in shared]
    monkeypatch.setenv("WORLD_SIZE", "1")
    alone = sampled(prompts, "num_steps=2", "overwrite=true")
    for row, waveform in zip(alone, waveforms, strict=True):
        assert np.abs(read_audio(tmp_path / "out" / row["file"])[0] - waveform).max() < 1e-4  # 16 bits


def test_the_default_sampler_is_the_best_of_the_comparison(sampled):
    (row,) = sampled("prompt=rain")
    assert row["sampler"]["_target_"].endswith(".unipc")
    assert (row["spacing"], row["num_steps"]) == ("log_snr", 20)


def test_under_a_memory_limit_as_many_rows_at_a_time_as_fit(sampled, monkeypatch, capsys):
    monkeypatch.setattr(requests, "peak_growth", lambda call, device: 1.5e9)
    rows = sampled("prompt=[rain,a hum,a bell]", "num_steps=2", "memory_limit=3.2")
    assert [row["index"] for row in rows] == [0, 1, 2]
    assert "memory_limit=3.2: 2 at a time" in capsys.readouterr().err


def test_weights_are_packed_where_it_pays_for_the_same_sound(sampled, tmp_path, monkeypatch):
    pack, packed, waveforms = TextToAudio.pack, [], []
    monkeypatch.setattr(TextToAudio, "pack", lambda self: packed.append(True) or pack(self))
    for pays in (1.0, 0.5):  # seconds of sound times steps; asked for are 0.2 times 4
        monkeypatch.setattr(requests, "PACKING_PAYS", pays)
        (row,) = sampled("prompt=rain", "num_steps=4", "overwrite=true")
        assert bool(packed) == (pays < 0.8)
        waveforms.append(read_audio(tmp_path / "out" / row["file"])[0])
    assert np.abs(waveforms[1] - waveforms[0]).max() < 1e-4  # 16 bits


def test_hashes_are_those_of_the_networks_whether_of_ours_or_of_another_vocoder(sampled, system):
    vocoder = toys.vocoder()
    save_network(vocoder, system / "other.safetensors", recipe=vocoder.recipe, provenance=None)
    overrides = ("prompt=rain", "num_steps=1", f"vocoder.path={system / 'other.safetensors'}")
    (row,) = sampled(*overrides)
    assert row["weights"]["vocoder"] == state_hash(vocoder.state_dict())
    assert row["weights"]["unet"] == state_hash(toys.pipeline().unet.state_dict())


def test_candidates_need_a_clap_that_hears(system, command, tmp_path, capsys):
    clap = toys.clap()
    clap.audio_tower = clap.audio_projection = None
    deaf = tmp_path / "deaf"
    deaf.mkdir()
    for file in system.iterdir():
        (deaf / file.name).symlink_to(file)
    (deaf / "clap.safetensors").unlink()
    recipe = toys.CLAP_RECIPE | {"audio_tower": None}
    save_network(toys.randomise(clap), deaf / "clap.safetensors", recipe=recipe, provenance=None)
    asked = (f"weights={deaf}", "prompt=rain", "num_waveforms_per_prompt=2", f"out={tmp_path / 'out'}")
    assert command("sample.py", *asked) == 2
    assert "no audio tower to rank candidates with, expected 1" in capsys.readouterr().err


@pytest.mark.parametrize(
    "overrides, told",
    [
        (["sampler=euler"], "unipc"),
        (["batch_size=0"], "batch_size=0: expected 1 or more"),
        (["memory_limit=none"], "memory_limit=none: expected GB, more than 0"),
        (["memory_limit=1e-6"], "memory_limit=1e-06: one sound takes 0."),
        (["duration=-1"], "duration=-1: expected seconds, more than 0"),
        (["edit=style_transfer", "edit.path={}/in.wav", "edit.strength=0"], "strength=0"),
        (["edit=inpainting", "edit.path={}/in.wav", "edit.mask=[]"], "mask"),
        (["edit=inpainting", "edit.path={}/in.wav", "edit.mask=[[0,9]]"], "mask"),
        (["prompt_embeds={}/odd.npy", "prompt=null"], "prompt_embeds (2, 5): expected"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(system, command, tmp_path, capsys, overrides, told):
    write_wav(tmp_path / "in.wav", 0.3 * torch.sin(torch.arange(8000) * 0.2), toys.RATE, subtype="FLOAT")
    np.save(tmp_path / "odd.npy", np.ones((2, 5), dtype=np.float32))
    given = [override.format(tmp_path) for override in overrides]
    code = command("sample.py", f"weights={system}", "prompt=rain", f"out={tmp_path / 'out'}", *given)
    said = capsys.readouterr().err
    assert code == 2 and told in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_prompt_that_is_too_long_is_told_with_what_was_cut(sampled):
    with pytest.warns(UserWarning, match="cut"):
        sampled("prompt=" + "a low hum and rain " * 60, "num_steps=1")
