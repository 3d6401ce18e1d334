"""Clips encoded once: written in shards, resumed, read back item by item, refused where they do not fit."""

import errno
import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import save_file

from ldm_audio.data.latents import Latents
from ldm_audio.data.loader import ItemKey
from ldm_audio.errors import InputError, RunError
from ldm_audio.pipelines import encode as encoding
from ldm_audio.pipelines.encode import Encoder, encode, settings_hash, state_hash

MADE_BY = {"vae": "v1", "data": "d1"}


@pytest.fixture(scope="module")
def networks() -> dict:
    made = {"vae": toys.vae(), "clap": toys.clap(), "vocoder": toys.vocoder()}
    return {name: toys.randomise(network).eval() for name, network in made.items()}


def encoder(networks: dict, **changes) -> Encoder:
    settings = {
        "mel": toys.mel(), "tokenizer": toys.tokenizer(), "mixup": toys.mixup(prob=0.0), "device": "cpu",
    }  # fmt: skip
    return Encoder(**networks | settings | changes)


def encoded(folder: Path, made: Encoder, count: int, *, read=None, **changes) -> tuple[int, list[int]]:
    """Writes toy items 0 to count - 1; returns how many were encoded, and what was told of the progress."""
    told = []

    def batches(ranges: list[range]) -> Iterable[dict]:
        return (toys.batch(*items) for items in ranges)

    settings = {"made_by": MADE_BY, "batch_size": 2, "shard_items": 2, "part": 0, "parts": 1}
    done = encode(read or batches, count, folder, encoder=made, progress=told.append, **settings | changes)
    return done, told


def data(folder: Path, **changes) -> Latents:
    return Latents(**{"path": str(folder), "seed": 0, "mixup": None} | changes)


def test_items_come_back_in_order_over_shards(tmp_path, networks):
    assert encoded(tmp_path / "new", encoder(networks), 5) == (5, [0, 2, 2, 1])
    files = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert files == ["index.json", *(f"shard_0000{number}.safetensors" for number in range(3))]
    found = data(tmp_path / "new")
    assert len(found) == 5 and found.captions() == [*toys.CAPTIONS, toys.CAPTIONS[0]]
    with torch.no_grad():
        for number in range(5):
            item, clip = found[ItemKey(3, number, 77)], toys.batch(number)
            posterior = networks["vae"].encode(toys.mel()(clip["waveform"]))
            assert (item["z_mean"] - posterior.mean[0]).abs().max() < 1e-5
            assert (item["z_std"] - posterior.std[0]).abs().max() < 1e-5
            assert (
                item["audio_embed"] - networks["clap"].embed_audio(clip["waveform"])[0]
            ).abs().max() < 1e-5
            text = networks["clap"].embed_text(*toys.tokenizer()(clip["caption"]))[0]
            assert (item["text_embed"] - text).abs().max() < 1e-5
            assert item["caption"] == clip["caption"][0] == found[number]["caption"]


def test_without_clap_there_are_the_same_latents_and_no_embeddings(tmp_path, networks):
    encoded(tmp_path / "with", encoder(networks), 3)
    encoded(tmp_path / "without", encoder(networks, clap=None, tokenizer=None), 3)
    with_clap, without = data(tmp_path / "with"), data(tmp_path / "without")
    for number in range(3):
        full, bare = with_clap[number], without[number]
        assert bare.keys() == full.keys() - {"audio_embed", "text_embed"}
        assert all(torch.equal(bare[name], full[name]) for name in ("z_mean", "z_std"))
        assert bare["caption"] == full["caption"]
    with pytest.raises(InputError, match="clap and tokenizer: give both, or leave both out"):
        encoder(networks, tokenizer=None)


def test_a_killed_encoding_goes_on_with_nothing_lost_or_repeated(tmp_path, networks):
    made, asked = encoder(networks), []

    def dies(ranges: list[range]) -> Iterable[dict]:
        for items in ranges:
            if items.start >= 4:
                raise KeyboardInterrupt
            yield toys.batch(*items)

    def counts(ranges: list[range]) -> Iterable[dict]:
        asked.extend(item for items in ranges for item in items)
        return (toys.batch(*items) for items in ranges)

    encoded(tmp_path / "whole", made, 7)
    with pytest.raises(KeyboardInterrupt):
        encoded(tmp_path / "killed", made, 7, read=dies)
    with pytest.raises(InputError, match=r"2 shards and no index\.json: not complete, encode again to go on"):
        data(tmp_path / "killed")
    first = tmp_path / "killed" / "shard_00000.safetensors"
    first.write_bytes(first.read_bytes()[:-9])  # a disk that filled up under another program
    assert encoded(tmp_path / "killed", made, 7, read=counts)[0] == 5
    assert asked == [0, 1, 4, 5, 6]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert encoded(tmp_path / "killed", made, 7, read=counts) == (0, [7]) and len(asked) == 5


def test_several_processes_share_the_shards(tmp_path, networks):
    made = encoder(networks)
    encoded(tmp_path / "whole", made, 7)
    assert encoded(tmp_path / "shared", made, 7, part=1, parts=2)[0] == 3
    assert not (tmp_path / "shared" / "index.json").exists()
    assert encoded(tmp_path / "shared", made, 7, part=0, parts=2)[0] == 4
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "shared" / path.name).read_bytes()


def test_a_folder_of_another_encoding_is_left_alone(tmp_path, networks):
    made = encoder(networks)
    encoded(tmp_path, made, 3)
    with pytest.raises(InputError, match=r"made with another vae \(v1, now v2\); choose another out="):
        encoded(tmp_path, made, 3, made_by=MADE_BY | {"vae": "v2"})
    with pytest.raises(InputError, match=r"holds shard_00001\.safetensors of a longer encoding"):
        encoded(tmp_path, made, 1)
    assert len(data(tmp_path)) == 3


def test_a_full_disk_keeps_the_shards_before_it(tmp_path, networks, monkeypatch):
    made, saved = encoder(networks), encoding.save_file

    def fills_up(tensors, path, metadata):
        if "00001" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path, metadata=metadata)

    with monkeypatch.context() as patched:
        patched.setattr(encoding, "save_file", fills_up)
        with pytest.raises(RunError, match=r"shard_00001\.safetensors: not written .*No space left"):
            encoded(tmp_path, made, 5)
    assert [path.name for path in tmp_path.iterdir()] == ["shard_00000.safetensors"]
    assert encoded(tmp_path, made, 5)[0] == 3


def test_hashes_tell_weights_and_settings_apart():
    one, other = toys.randomise(toys.vae()), toys.randomise(toys.vae())
    assert state_hash(one.state_dict()) == state_hash(other.state_dict())
    with torch.no_grad():
        other.quant_conv.bias[0] += 1e-6
    assert state_hash(one.state_dict()) != state_hash(other.state_dict())
    assert settings_hash({"a": 1, "b": [2]}) == settings_hash({"b": [2], "a": 1}) != settings_hash({"a": 1})


def test_a_clips_captions_change_from_epoch_to_epoch(tmp_path, networks):
    def several(ranges: list[range]) -> Iterable[dict]:
        names = [
            ["a dog barks", "a low hum"],
            ["rain on a roof"],
            ["a bell rings twice", "a low hum", "a dog barks"],
        ]
        return (toys.batch(*items) | {"captions": [names[item] for item in items]} for items in ranges)

    encoded(tmp_path, encoder(networks), 3, read=several)
    found = data(tmp_path)
    assert len(found.captions()) == 6
    seen = set()
    for epoch in range(30):
        item = found[ItemKey(epoch, 2, 2)]
        with torch.no_grad():
            text = networks["clap"].embed_text(*toys.tokenizer()([item["caption"]]))[0]
        assert (item["text_embed"] - text).abs().max() < 1e-5
        assert item["caption"] == data(tmp_path)[ItemKey(epoch, 2, 9)]["caption"]
        seen.add(item["caption"])
    assert seen == {"a bell rings twice", "a low hum", "a dog barks"}


def test_pairs_are_mixed_before_they_are_kept(tmp_path, networks):
    def pairs(ranges: list[range]) -> Iterable[dict]:
        ratio = torch.tensor([0.3, 1.0])
        return (
            toys.batch(0, 1) | {"partner": toys.batch(7, 8)["waveform"], "mix_ratio": ratio} for _ in ranges
        )

    mixup = toys.mixup(space="latent")
    encoded(tmp_path, encoder(networks, mixup=mixup), 2, read=pairs)
    item, unmixed = data(tmp_path)[0], data(tmp_path)[1]
    vae, mel = networks["vae"], toys.mel()
    with torch.no_grad():
        anchor, partner = (vae.encode(mel(toys.batch(i)["waveform"])) for i in (0, 7))
        mean = 0.3 * anchor.mean + 0.7 * partner.mean
        sound = networks["vocoder"](vae.decode(mean))[:, 0, : toys.SAMPLES]
        assert (item["z_mean"] - mean[0]).abs().max() < 1e-5
        assert (item["z_std"] - torch.hypot(0.3 * anchor.std, 0.7 * partner.std)[0]).abs().max() < 1e-5
        assert (item["audio_embed"] - networks["clap"].embed_audio(sound)[0]).abs().max() < 1e-5
        assert (unmixed["z_mean"] - vae.encode(mel(toys.batch(1)["waveform"])).mean[0]).abs().max() < 1e-5
    with pytest.raises(InputError, match=r"mixup\.space=latent: CLAP hears .* vocoder is null"):
        encoder(networks, mixup=mixup, vocoder=None)
    with pytest.raises(InputError, match=r"mixup\.text=interpolate: cannot be encoded beforehand"):
        encoder(networks, mixup=toys.mixup(text="interpolate"))


def windows(ranges: list[range]) -> Iterable[dict]:
    """Eight windows of three tracks: two of like tempo with downbeats, one faster."""
    rows = [
        ("a", 0, False, 120), ("a", 1, True, 120), ("a", 2, True, 120), ("b", 0, False, 121),
        ("b", 1, True, 121), ("c", 0, False, 150), ("c", 1, True, 150), ("d", 0, False, 120),
    ]  # fmt: skip
    keys = ("file", "start", "downbeat", "tempo")
    return (toys.batch(*items) | {"window": [dict(zip(keys, rows[i])) for i in items]} for items in ranges)


def test_cached_latents_are_mixed_from_downbeats_of_like_tempo(tmp_path, networks):
    encoded(tmp_path, encoder(networks), 8, read=windows)
    whole, mixed = data(tmp_path), data(tmp_path, mixup=toys.mixup(space="latent"))
    row = {tuple(whole[i]["z_mean"].flatten()[:8].tolist()): i for i in range(8)}
    which = lambda z: row[tuple(z.flatten()[:8].tolist())]  # noqa: E731
    pairs = set()
    for epoch in range(20):
        item = mixed[ItemKey(epoch, 0, 0)]
        pairs.add((which(item["z_mean"]), which(item["partner_z_mean"])))
        assert 0 < item["mix_ratio"] < 1
        assert torch.equal(item["z_mean"], data(tmp_path, mixup=mixed.mixup)[ItemKey(epoch, 0, 5)]["z_mean"])
    assert pairs == {(1, 4), (2, 4)}
    for alone in (5, 7):  # no other of that tempo; no downbeats
        item = mixed[ItemKey(0, alone, 0)]
        assert item["mix_ratio"] == 1 and which(item["z_mean"]) == alone and not item["partner_z_mean"].any()


def test_a_mixup_that_a_cache_cannot_do_is_refused(tmp_path, networks):
    encoded(tmp_path / "windows", encoder(networks), 8, read=windows)
    encoded(tmp_path / "clips", encoder(networks), 2)
    for folder, changes, told in (
        ("windows", {"space": "audio"}, r"mixup\.space=audio: cached latents are not mixed as sound"),
        ("windows", {"text": "both"}, r"mixup\.text=both: a cache has no embedding of joined captions"),
        ("clips", {}, r"none of the cached windows begins at a downbeat; encode data=windows"),
    ):
        with pytest.raises(InputError, match=told):
            data(tmp_path / folder, mixup=toys.mixup(**{"space": "latent"} | changes))


def test_shards_of_different_networks_are_refused(tmp_path, networks):
    encoded(tmp_path, encoder(networks), 4)
    encoded(tmp_path / "others", encoder(networks), 4, made_by=MADE_BY | {"vae": "v2"})
    (tmp_path / "others" / "shard_00001.safetensors").rename(tmp_path / "shard_00001.safetensors")
    with pytest.raises(InputError, match="were made by different encoders"):
        data(tmp_path)


def test_what_is_no_shard_is_refused_by_name(tmp_path, networks):
    with pytest.raises(
        InputError, match=rf"{tmp_path}: no shard_\*\.safetensors; make them with `ldm-audio encode"
    ):
        data(tmp_path)
    encoded(tmp_path, encoder(networks), 2)
    shard, index = tmp_path / "shard_00000.safetensors", tmp_path / "index.json"
    whole = shard.read_bytes()
    for content in (whole[: len(whole) // 2], b""):
        shard.write_bytes(content)
        with pytest.raises(InputError, match=r"shard_00000\.safetensors: not a readable shard"):
            data(tmp_path)
    save_file({"weight": torch.ones(1)}, shard)
    with pytest.raises(InputError, match=r"shard_00000\.safetensors: not a readable shard .*no z_mean"):
        data(tmp_path)
    save_file({name: torch.ones(1) for name in ("z_mean", "z_std", "text_embed")}, shard)
    with pytest.raises(InputError, match=r"shard_00000\.safetensors: not a readable shard .*no audio_embed"):
        data(tmp_path)
    save_file({name: torch.ones(1) for name in ("z_mean", "z_std", "audio_embed", "text_embed")}, shard)
    with pytest.raises(InputError, match=r"shard_00000\.safetensors: its header has no clips"):
        data(tmp_path)
    for text in ("{", "[]", json.dumps({"shards": []})):
        index.write_text(text)
        with pytest.raises(InputError, match=r"index\.json: not the index of an encoding"):
            data(tmp_path)
