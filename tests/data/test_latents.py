"""Clips encoded once: written in shards, read back item by item."""

from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import save_file

from ldm_audio.data.latents import Latents
from ldm_audio.data.loader import ItemKey
from ldm_audio.errors import InputError
from ldm_audio.pipelines.encode import encode, state_hash


@pytest.fixture(scope="module")
def parts() -> dict:
    networks = {"vae": toys.randomise(toys.vae()).eval(), "clap": toys.randomise(toys.clap()).eval()}
    return {"mel": toys.mel(), **networks}


def encoded(folder: Path, parts: dict, *items: int, shard_items: int = 2) -> list[int]:
    """Writes these items, in batches of two, and returns what was told of the progress."""
    told = []
    batches = [toys.batch(*items[i : i + 2]) for i in range(0, len(items), 2)]
    assert encode(batches, folder, **parts, shard_items=shard_items, progress=told.append) == len(items)
    return told


def test_items_come_back_in_order_over_shards(tmp_path, parts):
    assert encoded(tmp_path / "new", parts, 0, 1, 2, 3, 4) == [2, 2, 1]
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == [f"shard_0000{number}.safetensors" for number in range(3)]
    data = Latents(path=str(tmp_path / "new"))
    assert len(data) == 5 and data.captions() == [*toys.CAPTIONS, toys.CAPTIONS[0]]
    with torch.no_grad():
        for number in range(5):
            item, clip = data[ItemKey(3, number, 77)], toys.batch(number)
            posterior = parts["vae"].encode(parts["mel"](clip["waveform"]))
            assert (item["z_mean"] - posterior.mean[0]).abs().max() < 1e-5
            assert (item["z_std"] - posterior.std[0]).abs().max() < 1e-5
            assert (item["audio_embed"] - parts["clap"].embed_audio(clip["waveform"])[0]).abs().max() < 1e-5
            assert item["caption"] == clip["caption"][0] == data[number]["caption"]


def test_encoding_again_leaves_nothing_of_the_earlier_clips(tmp_path, parts):
    encoded(tmp_path, parts, 0, 1, 2, 3, 4)
    encoded(tmp_path, parts, 7, shard_items=100)
    assert Latents(path=str(tmp_path)).captions() == [toys.CAPTIONS[3]]


def test_shards_know_the_weights_that_made_them(tmp_path, parts):
    encoded(tmp_path, parts, 0)
    encoders = Latents(path=str(tmp_path)).encoders
    assert encoders == {"vae": state_hash(parts["vae"]), "clap": state_hash(parts["clap"])}
    other = toys.randomise(toys.vae())
    assert state_hash(other) == encoders["vae"]
    with torch.no_grad():
        other.quant_conv.bias[0] += 1e-6
    assert state_hash(other) != encoders["vae"]


def test_shards_of_different_networks_are_refused(tmp_path, parts):
    encoded(tmp_path, parts, 0)
    encoded(tmp_path / "others", parts | {"vae": toys.vae()}, 1)
    (tmp_path / "others" / "shard_00000.safetensors").rename(tmp_path / "shard_00001.safetensors")
    with pytest.raises(InputError, match="were made by different encoders"):
        Latents(path=str(tmp_path))


def test_what_is_no_shard_is_refused_by_name(tmp_path, parts):
    with pytest.raises(
        InputError, match=rf"{tmp_path}: no shard_\*\.safetensors; make them with `ldm-audio encode"
    ):
        Latents(path=str(tmp_path))
    encoded(tmp_path, parts, 0)
    shard = tmp_path / "shard_00000.safetensors"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        shard.write_bytes(content)
        with pytest.raises(InputError, match=r"shard_00000\.safetensors: not a readable shard"):
            Latents(path=str(tmp_path))
    save_file({"weight": torch.ones(1)}, shard)
    with pytest.raises(InputError, match=r"shard_00000\.safetensors: not a readable shard"):
        Latents(path=str(tmp_path))
    save_file({name: torch.ones(1) for name in ("z_mean", "z_std", "audio_embed")}, shard)
    with pytest.raises(InputError, match=r"shard_00000\.safetensors: its header has no captions"):
        Latents(path=str(tmp_path))
