"""Published weights through the public calls: load, convert, export, at toy size and in every layout."""

import json
import os
import re
import time
import warnings
from functools import partial

import foreign
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import ldm_audio
from ldm_audio import exchange, pretrained
from ldm_audio.convert import hifigan, laion
from ldm_audio.convert.rules import invert_rules
from ldm_audio.convert.sources import local
from ldm_audio.diffusion.samplers import ddim
from ldm_audio.errors import InputError
from ldm_audio.pipelines.text_to_audio import TextToAudio
from ldm_audio.randomness import RowRandom

SAMPLING = {"duration": 0.25, "num_steps": 5, "guidance_scale": 2.5, "spacing": "leading", "seed": 3}
PROMPTS = foreign.CAPTIONS[:2]


def equal(network: torch.nn.Module, expected: torch.nn.Module, *, but: tuple[str, ...] = ()) -> bool:
    one, other = network.state_dict(), expected.state_dict()
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one if name not in but)


def sound(system: TextToAudio) -> torch.Tensor:
    sampler = partial(ddim, eta=0.0)
    return system(PROMPTS, sampler=sampler, batch_size=2, **SAMPLING).waveforms


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A toy `audioldm-*.ckpt`, with a tokenizer beside it in `words/`."""
    foreign.allow_toy_vocoder(monkeypatch)
    foreign.save_tokenizer(tmp_path / "words")
    path = tmp_path / "audioldm-toy.ckpt"
    torch.save({"state_dict": foreign.checkpoint_state(foreign.networks()), "global_step": 9}, path)
    return path


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """diffusers' pipelines and the folders that they saved."""
    found = {}
    for name in ("AudioLDMPipeline", "MusicLDMPipeline"):
        folder = tmp_path_factory.mktemp(name)
        found[name] = foreign.their_pipeline(name), folder
        found[name][0].save_pretrained(folder)
    return found


def test_an_original_checkpoint_gives_its_averaged_weights_and_scale(checkpoint):
    system = ldm_audio.load(checkpoint, tokenizer=checkpoint.parent / "words")
    for name, network in foreign.networks().items():
        assert equal(getattr(system, name), network), name
    assert system.latent_scale == foreign.LATENT_SCALE
    assert system.unet.recipe["num_heads"] == [1, 2]
    assert system.clap.text_tower.norm.eps == 1e-5
    assert not any(p.requires_grad or p.is_meta for p in system.unet.parameters())


def test_the_raw_weights_come_on_request(checkpoint):
    raw = ldm_audio.load(checkpoint, tokenizer=checkpoint.parent / "words", ema=False)
    averaged = foreign.networks()["unet"].state_dict()
    assert all(torch.equal(tensor, averaged[name] + 1) for name, tensor in raw.unet.state_dict().items())


def test_one_part_of_a_checkpoint_can_be_had_alone(checkpoint):
    assert equal(pretrained.load_network(checkpoint, part="vae"), foreign.networks()["vae"])
    with pytest.raises(InputError, match="holds unet, vae, vocoder, clap, expected one network alone"):
        pretrained.load_network(checkpoint)


@pytest.mark.parametrize("ema", [True, False])
def test_a_converted_checkpoint_sounds_like_the_checkpoint(checkpoint, tmp_path, ema):
    words = checkpoint.parent / "words"
    source = exchange.convert(checkpoint, tmp_path / "ours", tokenizer=words, ema=ema)
    assert source.notes[0] == f"the UNet's {'averaged' if ema else 'raw'} weights"
    direct, converted = (
        ldm_audio.load(checkpoint, tokenizer=words, ema=ema),
        ldm_audio.load(tmp_path / "ours"),
    )
    assert torch.equal(sound(direct), sound(converted))
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [
        "clap.safetensors", "system.json", "tokenizer.json", "unet.safetensors", "vae.safetensors",
        "vocoder.safetensors",
    ]  # fmt: skip
    assert converted.unet.provenance["kind"] == "original AudioLDM checkpoint"


def test_a_checkpoint_without_tokenizer_says_how_to_give_one(checkpoint, tmp_path):
    for call in (ldm_audio.load, partial(exchange.convert, out=tmp_path / "ours")):
        with pytest.raises(InputError, match=r"audioldm-toy\.ckpt: holds no vocabulary; give tokenizer="):
            call(checkpoint)
    assert not (tmp_path / "ours").exists()


def test_a_tokenizer_of_another_vocabulary_is_refused(checkpoint, tmp_path):
    from ldm_audio.data.tokenizers import train_bpe

    words = train_bpe(
        [f"{a}{b}{a}" for a in "abcdefghij" for b in "klmnopqrst"], vocab_size=400, max_length=9
    )
    words.save(tmp_path / "tokenizer.json")
    with pytest.raises(InputError, match=r"tokenizer\.json: \d+ tokens, the text tower of .* knows 300"):
        ldm_audio.load(checkpoint, tokenizer=tmp_path / "tokenizer.json")


def test_training_leftovers_of_a_musicldm_checkpoint_are_dropped(checkpoint):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(3)
    torch.save(content, checkpoint)
    assert equal(pretrained.load_network(checkpoint, part="vae"), foreign.networks()["vae"])


def test_nothing_is_overwritten(checkpoint, tmp_path):
    words = checkpoint.parent / "words"
    exchange.convert(checkpoint, tmp_path / "ours", tokenizer=words)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "ours").iterdir()}
    with pytest.raises(InputError, match="exists already; choose another place"):
        exchange.convert(checkpoint, tmp_path / "ours", tokenizer=words)
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "ours").iterdir()}


@pytest.mark.parametrize("name", ["AudioLDMPipeline", "MusicLDMPipeline"])
def test_a_diffusers_folder_sounds_the_same_here(pipelines, name):
    theirs, folder = pipelines[name]
    ours = ldm_audio.load(folder)
    embeds = {"prompt_embeds": ours.embed(PROMPTS, 2), "negative_prompt_embeds": ours.embed(["", ""], 2)}
    texts = {"prompt": PROMPTS} if name == "AudioLDMPipeline" else embeds  # MusicLDM's text path is broken
    sounds = sound(ours)
    expected = theirs(
        **texts,
        audio_length_in_s=SAMPLING["duration"],
        num_inference_steps=SAMPLING["num_steps"],
        guidance_scale=SAMPLING["guidance_scale"],
        latents=RowRandom([(3, 0), (3, 0)]).randn(*ours.latent_shape(sounds.shape[1])),
        output_type="pt",
    ).audios
    assert sounds.shape == expected.shape and expected.std() > 1e-3
    assert (sounds - expected).abs().max() < 1e-4


@pytest.mark.parametrize("name", ["AudioLDMPipeline", "MusicLDMPipeline"])
def test_the_round_trip_through_ours_is_exact(pipelines, tmp_path, name):
    import diffusers

    theirs, folder = pipelines[name]
    exchange.convert(folder, tmp_path / "ours")
    exchange.export(tmp_path / "ours", tmp_path / "back", to="diffusers")
    back = getattr(diffusers, name).from_pretrained(tmp_path / "back")
    for part in ("unet", "vae", "vocoder", "text_encoder"):
        # The vocoder's statistics are unused, and ours has none.
        assert equal(getattr(back, part), getattr(theirs, part), but=("mean", "scale")), part
    assert back.vae.config.scaling_factor == theirs.vae.config.scaling_factor
    assert back.text_encoder.config.to_dict().get(
        "layer_norm_eps"
    ) == theirs.text_encoder.config.to_dict().get("layer_norm_eps")
    assert torch.allclose(back.scheduler.alphas_cumprod, theirs.scheduler.alphas_cumprod)
    text = "a dog barks in a large hall"
    assert back.tokenizer(text).input_ids == theirs.tokenizer(text).input_ids
    assert back.tokenizer.model_max_length == 60


def old_attention_names(state: dict) -> dict:
    """diffusers' autoencoder before 0.18: `query`, `proj_attn`, some as 1x1 convolutions."""
    pairs = (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn"))
    for new, old in pairs:
        state = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for name, t in state.items()}
    return {n: t[:, :, None, None] if n.endswith("query.weight") else t for n, t in state.items()}


def copied(folder, to):
    import shutil

    return shutil.copytree(folder, to)


@pytest.mark.parametrize("layout", ["old names", "bin", "variant", "shards", "bin shards", "vocab.json"])
def test_every_way_of_storing_a_folder_loads_the_same(pipelines, tmp_path, layout):
    folder = pipelines["AudioLDMPipeline"][1]
    copy = copied(folder, tmp_path / "copy")
    vae = copy / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(vae)
    if layout == "old names":
        save_file(old_attention_names(state), vae)
    if layout == "bin":
        torch.save(state, vae.with_suffix(".bin"))
        vae.unlink()
    if layout == "variant":
        vae.rename(vae.with_name("diffusion_pytorch_model.non_ema.safetensors"))
    if "shards" in layout:
        vae.unlink()
        ending = "bin" if "bin" in layout else "safetensors"
        names, files = list(state), [f"diffusion_pytorch_model-0000{i}-of-00002.{ending}" for i in (1, 2)]
        weight_map = {name: files[i % 2] for i, name in enumerate(names)}
        for file in files:
            write = torch.save if ending == "bin" else save_file
            write({name: state[name] for name in names if weight_map[name] == file}, vae.with_name(file))
        index = vae.with_name(f"diffusion_pytorch_model.{ending}.index.json")
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if layout == "vocab.json":
        foreign.tokenizer().backend.model.save(str(copy / "tokenizer"))
        (copy / "tokenizer" / "tokenizer.json").unlink()
    assert torch.equal(sound(ldm_audio.load(copy)), sound(ldm_audio.load(folder)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_and_says_so(pipelines, tmp_path, dtype):
    folder = pipelines["AudioLDMPipeline"][1]
    vae = copied(folder / "vae", tmp_path / "vae") / "diffusion_pytorch_model.safetensors"
    state = {name: tensor.to(dtype) for name, tensor in load_file(vae).items()}
    save_file(state, vae)
    with pytest.warns(UserWarning, match=f"holds {str(dtype)[6:]} weights, taken as float32"):
        network = ldm_audio.load(vae.parent)
    exact = ldm_audio.load(folder / "vae").state_dict()
    for name, tensor in network.state_dict().items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, exact[name].to(dtype).float())


def test_heads_of_a_diffusers_folder_are_the_configs_and_the_originals_on_request(tmp_path):
    from diffusers import UNet2DConditionModel

    config = {
        "block_out_channels": (32, 64), "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": (32, 64),
        "layers_per_block": 1, "attention_head_dim": 8,
    }  # fmt: skip
    UNet2DConditionModel(**config).save_pretrained(tmp_path)
    told = r"heads \[8, 8\] as its config says, .* has \[1, 2\]; heads=original takes those"
    with pytest.warns(UserWarning, match=told):
        assert ldm_audio.load(tmp_path).recipe["num_heads"] == [8, 8]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ldm_audio.load(tmp_path, heads="original").recipe["num_heads"] == [1, 2]
    with pytest.raises(InputError, match="heads=many: expected config or original"):
        ldm_audio.load(tmp_path, heads="many")


def save_clap(folder, *, fused=False, kind="ClapModel"):
    import transformers

    audio = {
        "patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [1, 2], "num_attention_heads": [2, 4],
        "enable_fusion": fused,
    }  # fmt: skip
    text = foreign.their_clap(text_only=True).config.to_dict()
    configs = {
        "ClapModel": lambda: transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=24),
        "ClapTextModelWithProjection": lambda: transformers.ClapTextConfig(**text),
        "ClapAudioModelWithProjection": lambda: transformers.ClapAudioConfig(**audio, projection_dim=24),
    }
    network = foreign.randomise(getattr(transformers, kind)(configs[kind]()))
    network.save_pretrained(folder)
    truncation = "fusion" if fused else "rand_trunc"
    transformers.ClapFeatureExtractor(frequency_min=50, truncation=truncation).save_pretrained(folder)
    return network


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_transformers_clap_folders_embed_the_same_there_and_back(tmp_path, fused):
    import transformers

    theirs = save_clap(tmp_path / "theirs", fused=fused)
    foreign.save_tokenizer(tmp_path / "theirs")
    ours = ldm_audio.load(tmp_path / "theirs")
    tokens, mask = foreign.tokenizer()(foreign.CAPTIONS)
    expected = theirs.get_text_features(tokens, mask).pooler_output
    assert (ours.embed_text(tokens, mask) - expected).abs().max() < 1e-5
    assert ours.front_end.fusion is fused and ours.front_end.fmin == 50

    channels = 4 if fused else 1
    mel = 20 * torch.randn(3, channels, 1001, 64, generator=torch.Generator().manual_seed(0)) - 40
    for longer in (
        ([True, False, True], [False, False, True], [False, False, False]) if fused else ([False] * 3,)
    ):
        is_longer = torch.tensor(longer)
        expected = theirs.get_audio_features(mel, is_longer=is_longer[:, None]).pooler_output
        assert (ours.embed_mel(mel, is_longer) - expected).abs().max() < 1e-5

    exchange.convert(tmp_path / "theirs", tmp_path / "ours")
    exchange.export(tmp_path / "ours" / "clap.safetensors", tmp_path / "back", to="transformers")
    back = transformers.ClapModel.from_pretrained(tmp_path / "back")
    assert equal(back, theirs)
    extractor = transformers.ClapFeatureExtractor.from_pretrained(tmp_path / "back")
    assert extractor.frequency_min == 50 and extractor.truncation == ("fusion" if fused else "rand_trunc")


@torch.no_grad()
@pytest.mark.parametrize("fused", [False, True])
def test_sounds_of_every_length_embed_as_in_transformers(tmp_path, monkeypatch, fused):
    theirs, ours = save_clap(tmp_path, fused=fused), ldm_audio.load(tmp_path)
    for num_samples in (100_000, 479_999, 480_000, 480_001, 960_000):
        sound = 0.1 * np.random.default_rng(num_samples).standard_normal(num_samples)
        features = foreign.clap_features(sound, monkeypatch, fusion=fused)
        mel, is_longer = ours.front_end(torch.from_numpy(sound)[None])
        assert is_longer.item() == (num_samples >= (480_480 if fused else 480_001))
        expected = theirs.get_audio_features(features, is_longer=is_longer[:, None]).pooler_output
        assert (ours.embed_mel(mel.float(), is_longer) - expected).abs().max() < 1e-5, num_samples


@torch.no_grad()
@pytest.mark.parametrize("half", ["Text", "Audio"])
def test_halves_of_clap_load_alone_and_go_back(tmp_path, half):
    import transformers

    kind = f"Clap{half}ModelWithProjection"
    theirs = save_clap(tmp_path / "theirs", kind=kind)
    foreign.save_tokenizer(tmp_path / "theirs")
    ours = ldm_audio.load(tmp_path / "theirs")
    if half == "Text":
        tokens, mask = foreign.tokenizer()(foreign.CAPTIONS)
        expected, embed = theirs(tokens, mask).text_embeds, ours.embed_text(tokens, mask)
        with pytest.raises(InputError, match="no audio tower"):
            ours.embed_audio(torch.zeros(1, 480000))
    else:
        mel = 20 * torch.randn(2, 1, 1001, 64, generator=torch.Generator().manual_seed(0)) - 40
        expected, embed = theirs(mel).audio_embeds, ours.embed_mel(mel, torch.zeros(2, dtype=torch.bool))
        with pytest.raises(InputError, match="no text tower"):
            ours.embed_text(torch.zeros(1, 3, dtype=torch.int64), torch.ones(1, 3, dtype=torch.bool))
    assert (embed - torch.nn.functional.normalize(expected, dim=-1)).abs().max() < 1e-5
    exchange.convert(tmp_path / "theirs", tmp_path / "clap.safetensors")
    exchange.export(tmp_path / "clap.safetensors", tmp_path / "back", to="transformers")
    assert equal(getattr(transformers, kind).from_pretrained(tmp_path / "back"), theirs)


def test_laion_files_load_with_and_without_their_training_state(tmp_path):
    network = foreign.networks()["clap"]
    state = foreign.laion_state(network)
    learning_rate = 0.5 * (1 + np.cos(1.0)) * 1e-4  # numpy's, as LAION's cosine schedule leaves it
    content = {
        "epoch": 3,
        "name": "toy",
        "state_dict": foreign.with_prefix(state, "module."),
        "optimizer": {"param_groups": [{"lr": learning_rate, "betas": (0.9, 0.999)}], "n": np.int64(3)},
    }
    slim = {name: t for name, t in state.items() if not name.endswith("position_ids")}
    for name, saved in (("full.pt", content), ("bare.pt", state), ("slim.pt", {"state_dict": slim})):
        torch.save(saved, tmp_path / name)
        assert equal(ldm_audio.load(tmp_path / name), network), name


def test_a_laion_file_converts_with_its_tokenizer_beside_it(tmp_path):
    torch.save(foreign.laion_state(foreign.networks()["clap"]), tmp_path / "630k.pt")
    with pytest.raises(InputError, match="give tokenizer="):
        exchange.convert(tmp_path / "630k.pt", tmp_path / "clap.safetensors")
    words = foreign.save_tokenizer(tmp_path / "words")
    exchange.convert(tmp_path / "630k.pt", tmp_path / "ours" / "clap.safetensors", tokenizer=words)
    assert equal(ldm_audio.load(tmp_path / "ours" / "clap.safetensors"), foreign.networks()["clap"])
    assert (tmp_path / "ours" / "tokenizer.json").exists()


def test_htsat_from_audioset_is_an_audio_tower(tmp_path):
    tower = foreign.networks()["clap"].audio_tower
    state = invert_rules(laion.htsat_rules(), tower.state_dict())
    state |= {"tscam_conv.weight": torch.zeros(3), "head.weight": torch.zeros(3)}
    torch.save({"state_dict": foreign.with_prefix(state, "sed_model.")}, tmp_path / "HTSAT.ckpt")
    assert equal(ldm_audio.load(tmp_path / "HTSAT.ckpt"), tower)


@pytest.mark.parametrize("pooler", [True, False])
def test_roberta_is_a_text_tower_with_or_without_its_pooler(tmp_path, pooler):
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=300, hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=80, layer_norm_eps=1e-5, type_vocab_size=1,
    )  # fmt: skip
    kind = transformers.RobertaModel if pooler else transformers.RobertaForMaskedLM
    theirs = foreign.randomise(kind(config))
    theirs.save_pretrained(tmp_path)
    foreign.save_tokenizer(tmp_path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        ours = ldm_audio.load(tmp_path)
    assert any("holds no pooler, which begins at random" in str(w.message) for w in told) is not pooler
    tokens, mask = foreign.tokenizer()(foreign.CAPTIONS)
    with torch.no_grad():
        hidden, pooled = ours(tokens, mask)
        expected = (theirs if pooler else theirs.roberta)(tokens, mask)
    assert ((hidden - expected.last_hidden_state).abs() * mask[..., None]).max() < 1e-5
    if pooler:
        assert (pooled - expected.pooler_output).abs().max() < 1e-5


def test_a_standalone_vae_and_the_vocoder_inside_it(tmp_path, monkeypatch):
    parts = foreign.networks()
    state = foreign.vae_state(parts["vae"]) | {"loss.logvar": torch.zeros(())}
    torch.save({"state_dict": state}, tmp_path / "vae.ckpt")
    assert equal(ldm_audio.load(tmp_path / "vae.ckpt"), parts["vae"])
    foreign.allow_toy_vocoder(monkeypatch)
    state |= foreign.with_prefix(parts["vocoder"].state_dict(), "vocoder.")
    torch.save({"state_dict": state}, tmp_path / "both.ckpt")
    assert equal(pretrained.load_network(tmp_path / "both.ckpt", part="vocoder"), parts["vocoder"])
    exchange.convert(tmp_path / "both.ckpt", tmp_path / "ours")
    assert sorted(p.name for p in (tmp_path / "ours").iterdir()) == ["vae.safetensors", "vocoder.safetensors"]


@pytest.mark.parametrize("legacy", [True, False])
def test_a_hifigan_generator_loads_by_the_json_beside_it(tmp_path, legacy):
    vocoder = foreign.networks()["vocoder"]
    state = {}
    for name, tensor in vocoder.state_dict().items():
        if name.endswith("weight"):  # as trained: direction and length
            axes = tuple(range(1, tensor.ndim))
            state[f"{name}_g"] = torch.linalg.vector_norm(tensor, dim=axes, keepdim=True)
            state[f"{name}_v"] = 3 * tensor
        else:
            state[name] = tensor
    torch.save({"generator": state}, tmp_path / "g_00001", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match="give the JSON config that belongs to it"):
        ldm_audio.load(tmp_path / "g_00001")
    (tmp_path / "config.json").write_text(json.dumps(foreign.VOCODER_JSON))
    ours = ldm_audio.load(tmp_path / "g_00001")
    for name, tensor in ours.state_dict().items():
        assert (tensor - vocoder.state_dict()[name]).abs().max() < 1e-6
    exchange.convert(tmp_path / "g_00001", tmp_path / "vocoder.safetensors")
    exchange.export(tmp_path / "vocoder.safetensors", tmp_path / "back", to="transformers")
    back = ldm_audio.load(tmp_path / "back")
    assert equal(back, ours) and back.recipe == ours.recipe
    assert json.loads((tmp_path / "back" / "config.json").read_text())["sampling_rate"] == 16000
    assert hifigan.SPEECHT5_SETTINGS["normalize_before"].default


def test_a_collapsed_text_tower_is_warned_about(tmp_path):
    network = foreign.networks()["clap"]
    torch.nn.init.zeros_(network.text_tower.pooler.weight)
    torch.save(foreign.laion_state(network), tmp_path / "collapsed.pt")
    with pytest.warns(UserWarning, match=r"nearly the same embedding for all captions \(smallest cosine 1\."):
        ldm_audio.load(tmp_path / "collapsed.pt")
    words = foreign.save_tokenizer(tmp_path / "words")
    with pytest.warns(UserWarning, match="nearly the same embedding"):
        exchange.convert(tmp_path / "collapsed.pt", tmp_path / "ours", tokenizer=words)
    torch.save(foreign.laion_state(foreign.networks()["clap"]), tmp_path / "sound.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ldm_audio.load(tmp_path / "sound.pt")


def test_the_hub_without_a_network_says_so_within_seconds(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    sleeps = []
    monkeypatch.setattr(time, "sleep", sleeps.append)
    for path in ("hf://cvssp/audioldm", "hf://roberta-base@main", "hf://lukewys/laion_clap/630k-best.pt"):
        told = f"{re.escape(path)}: not on this machine and the hub did not give it .*give their folder"
        with pytest.raises(InputError, match=told) as caught:
            ldm_audio.load(path)
        assert "\n" not in str(caught.value)
    assert not sleeps  # it is asked once
    with pytest.raises(InputError, match="expected hf://owner/name"):
        ldm_audio.load("hf://")


def test_the_hub_is_asked_for_settings_and_one_copy_of_the_weights(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []

    def download(repo, *, revision, allow_patterns, ignore_patterns, etag_timeout):
        asked.append((repo, revision, *allow_patterns))
        if allow_patterns == ["*.bin"]:
            save_clap(tmp_path)
            torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
            (tmp_path / "model.safetensors").unlink()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert ldm_audio.load("hf://laion/toy@v2").joint_dim == 24
    assert asked == [
        ("laion/toy", "v2", "*.json", "*.txt"),
        ("laion/toy", "v2", "*.safetensors"),
        ("laion/toy", "v2", "*.bin"),
    ]
    asked.clear()
    assert local("hf://laion/toy@v2/config.json") == tmp_path / "config.json"
    assert asked == [("laion/toy", "v2", "config.json")]
    with pytest.raises(InputError, match=r"hf://laion/toy/630k\.pt: the repository holds no such file"):
        ldm_audio.load("hf://laion/toy/630k.pt")


def test_a_pickle_that_would_run_code_is_refused_by_name(tmp_path):
    ran = tmp_path / "ran"

    class Attack:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    for name, new_format in (("new.ckpt", True), ("old.ckpt", False)):
        path = tmp_path / name
        torch.save({"state_dict": {"a": Attack()}}, path, _use_new_zipfile_serialization=new_format)
        with pytest.raises(InputError, match=rf"{name}: refused.*system"):
            ldm_audio.load(path)
    assert not ran.exists()
