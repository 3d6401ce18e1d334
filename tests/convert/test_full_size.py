"""Released layouts at full size: key lists load strictly on the meta device, parameters are counted.

Slow: a random checkpoint of full size is converted, exported, and sounds the same in diffusers.
"""

import json
import shutil
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import foreign
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from ldm_audio.convert import laion
from ldm_audio.convert.clap import preprocessor_config, transformers_config, transformers_recipe
from ldm_audio.convert.originals import recognise
from ldm_audio.convert.rules import invert_rules, plan
from ldm_audio.convert.stored import Tensors
from ldm_audio.data.tokenizers import train_bpe
from ldm_audio.diffusion.samplers import ddim
from ldm_audio.errors import InputError
from ldm_audio.exchange import export
from ldm_audio.pretrained import build, load_network, load_system, state_of
from ldm_audio.randomness import RowRandom

CONFIGS = Path(__file__).parents[2] / "configs"


class Scaled(Tensors):
    """Tensors whose one number that is needed, the scale of the latents, is there."""

    def __getitem__(self, name: str) -> torch.Tensor:
        return torch.tensor(0.5) if name == "scale_factor" else super().__getitem__(name)


def released(name: str) -> Scaled:
    return Scaled(Tensors.of(foreign.key_list(name)).entries)


# Floating-point numbers of UNet, VAE, folded vocoder and CLAP, running statistics left out.
COUNTS = {
    "audioldm-s-full": (185_036_552, 55_376_873, 55_264_897, 153_492_890),
    "audioldm-m-full": (415_954_568, 55_376_873, 55_264_897, 193_913_882),
    "audioldm-l-full": (739_139_080, 55_376_873, 55_264_897, 153_492_890),
    "musicldm": (185_036_552, 55_376_873, 55_264_897, 193_913_882),
}
HEADS = {"audioldm-m-full": [6, 12, 18, 30]}


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("name", COUNTS)
def test_a_whole_released_checkpoint_converts_strictly(name, ema):
    state = released(name)
    source = recognise(state, name, ema=ema)
    assert list(source.parts) == ["unet", "vae", "vocoder", "clap"]
    for part, count in zip(source.parts.values(), COUNTS[name], strict=True):
        part.check(state_of(part))
        assert sum(p.numel() for p in build(part.recipe, source=name).parameters()) == count
    assert source.parts["unet"].recipe["num_heads"] == HEADS.get(name, [4, 8, 12, 20])
    assert source.system["family"] == ("musicldm" if name == "musicldm" else "audioldm")
    assert source.system["mel"]["n_mels"] == 64 and source.system["latent_scale"] == 0.5

    # Every tensor of the file is taken, or dropped by a rule, or of the UNet's other copy, or a constant.
    used = [
        n for part in source.parts.values() for m in plan(part.rules, part.tensors, None) for n in m.sources
    ]
    others = 690 + 12 + 2 + 2  # the other UNet, schedule buffers, logvar and scale_factor, EMA's counters
    assert len(used) + others == len(state)


def test_the_loss_networks_of_a_training_checkpoint_are_dropped():
    state = foreign.key_list("musicldm")
    state |= {f"first_stage_model.loss.{name}": torch.empty(3, device="meta") for name in ("logvar", "a.b.c")}
    source = recognise(Scaled(Tensors.of(state).entries), "musicldm", ema=True)
    source.parts["vae"].check(state_of(source.parts["vae"]))


@pytest.mark.parametrize(
    "name", ["model_ema.extra", "first_stage_model.extra", "extra", "cond_stage_model.extra"]
)
def test_a_tensor_that_no_table_knows_is_refused(name):
    state = Scaled(
        Tensors.of(foreign.key_list("audioldm-s-full") | {name: torch.empty(2, device="meta")}).entries
    )
    with pytest.raises(InputError, match=r"no rule takes .*extra"):
        for part in recognise(state, "a file", ema=True).parts.values():
            part.check(state_of(part))


def test_a_checkpoint_without_averages_names_the_way_out():
    state = Scaled(Tensors.of(foreign.key_list("audioldm-s-full")).without("model_ema.").entries)
    with pytest.raises(InputError, match=r"holds no averaged weights .* take the others with raw"):
        recognise(state, "a file", ema=True)
    assert recognise(state, "a file", ema=False).parts["unet"]


# What is counted: the parameters of the network in the form in which it is used (no running statistics, no
# constants, weight norm folded); of a CLAP both towers, both projections and both scales.
PARAMETERS = {
    "unet/audioldm_s": 185_036_552,
    "unet/audioldm_m": 415_954_568,
    "unet/audioldm_l": 739_139_080,
    "unet/musicldm": 185_036_552,
    "unet/audioldm_48k": 262_699_152,
    "vae/mel64": 55_376_873,
    "vae/mel256": 223_535_569,
    "vocoder/hifigan_16k": 55_264_897,
    "vocoder/hifigan_48k": 190_281_889,
    "clap/htsat_tiny": 153_492_890,
    "clap/htsat_tiny_fused": 153_507_530,
    "clap/htsat_base": 193_913_882,
    "clvp/tortoise": 243_846_145,
    "speech_lm/tortoise": 421_526_786,
    "dvae/tortoise": 51_567_184,
    "clap/htsat_base_fused": 193_937_498,
    "clap/htsat_large": 397_465_754,
    "clap/htsat_large_fused": 397_545_754,
}
# The audio tower alone, as transformers' audio_model: mel norm, patches, stages, norm.
TOWERS = {"htsat_tiny": 27_534_488, "htsat_base": 67_824_408, "htsat_large": 270_851_992}
FUSION = {"htsat_tiny": 14_640, "htsat_base": 23_616, "htsat_large": 80_000}  # what aff_2d adds to it
TEXT_TOWER = 124_645_632


def parameters(name: str, **changes) -> dict[str, torch.nn.Parameter]:
    config = OmegaConf.load(CONFIGS / f"{name}.yaml")
    for key, value in changes.items():
        OmegaConf.update(config, key, value)
    with torch.device("meta"):
        return dict(instantiate(config, _convert_="all").named_parameters())


@pytest.mark.parametrize("name", PARAMETERS)
def test_configs_have_the_counted_parameters(name):
    assert sum(p.numel() for p in parameters(name).values()) == PARAMETERS[name]


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", TOWERS)
def test_towers_of_clap_have_the_counted_parameters(name, fused):
    found = parameters(f"clap/{name}{'_fused' if fused else ''}")
    sizes = dict.fromkeys(("audio_tower", "text_tower"), 0)
    for key, parameter in found.items():
        if key.split(".")[0] in sizes:
            sizes[key.split(".")[0]] += parameter.numel()
    assert sizes["audio_tower"] == TOWERS[name] + (FUSION[name] if fused else 0)
    assert sizes["text_tower"] == TEXT_TOWER


def clap_config(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIGS / "clap" / f"{name}.yaml"))


@pytest.mark.parametrize("name", [f"{tower}{fused}" for tower in TOWERS for fused in ("", "_fused")])
def test_every_size_of_clap_is_read_off_laions_names_and_shapes(name):
    config = clap_config(name)
    state = invert_rules(laion.clap_rules(), build(config, source=name).state_dict())
    source = recognise(Tensors.of(foreign.with_prefix(state, "module.")), name, ema=True)
    assert source.parts["clap"].recipe == config
    source.parts["clap"].check(state_of(source.parts["clap"]))


@pytest.mark.parametrize("name", [f"{tower}{fused}" for tower in TOWERS for fused in ("", "_fused")])
def test_every_size_of_clap_has_a_config_in_transformers_and_comes_back(name):
    config = clap_config(name)
    theirs, preprocessor = transformers_config(config), preprocessor_config(config["front_end"])
    assert transformers_recipe(theirs, preprocessor) == config


def test_channel_map_fusion_gives_the_patches_four_channels():
    found = parameters("clap/htsat_tiny_fused", **{"audio_tower.fusion": "channel_map"})
    patches = 3 * 96 * 4 * 4
    assert sum(p.numel() for p in found.values()) == 153_492_890 + patches


# The peak of this process alone: `resource` would begin with that of the process which started it.
CONVERT = """
    import json, sys, time
    from pathlib import Path
    from ldm_audio.exchange import convert
    started = time.perf_counter()
    convert(sys.argv[1], sys.argv[2], tokenizer=sys.argv[3])
    seconds = time.perf_counter() - started
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    peak = int(status["VmHWM"].split()[0]) * 1024
    print(json.dumps({"seconds": seconds, "processor": time.process_time(), "peak": peak}))
"""
AVERAGED = "model_ema.diffusion_modelinput_blocks41transformer_blocks0attn1to_qweight"
ENCODER = "first_stage_model.encoder.conv_in.weight"


@pytest.fixture(scope="module")
def full_size(tmp_path_factory):
    """A random `audioldm-s-full.ckpt` of 2.6 GB as a system of ours, two of its tensors, and what it took."""
    folder = tmp_path_factory.mktemp("full_size")
    state = foreign.key_list("audioldm-s-full")
    generator = torch.Generator().manual_seed(0)
    for name, tensor in state.items():
        if tensor.dtype == torch.int64:
            state[name] = torch.zeros(tensor.shape, dtype=torch.int64)
        else:
            state[name] = foreign.random_like(name, tensor.shape, generator)
    state["scale_factor"] = torch.tensor(0.9227914214134216)
    samples = {name: state[name].clone() for name in (AVERAGED, ENCODER)}
    path = folder / "audioldm-s-full.ckpt"
    torch.save({"state_dict": state}, path)
    state.clear()
    size = path.stat().st_size
    train_bpe(["a dog barks"], vocab_size=300, max_length=77).save(folder / "tokenizer.json")

    command = [
        sys.executable,
        "-c",
        textwrap.dedent(CONVERT),
        path,
        folder / "ours",
        folder / "tokenizer.json",
    ]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    path.unlink()
    took = json.loads(done.stdout)
    print(f"{took['seconds']:.1f} s, peak {took['peak'] / size:.2f} times the file of {size:,} bytes")
    yield folder / "ours", samples, took | {"size": size}
    shutil.rmtree(folder)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_full_size_checkpoint_converts_within_a_minute_and_little_more_than_its_size(full_size):
    folder, samples, took = full_size
    assert took["size"] > 2.5e9
    assert took["processor"] < 60  # not by the clock, which other processes hold up
    assert took["peak"] < 1.3 * took["size"]
    unet = load_network(folder / "unet.safetensors").state_dict()
    assert torch.equal(unet["down.1.blocks.0.transformers.0.layers.0.attn1.to_q.weight"], samples[AVERAGED])
    vae = load_network(folder / "vae.safetensors").state_dict()
    assert torch.equal(vae["encoder.conv_in.weight"], samples[ENCODER])


@pytest.mark.slow
@torch.no_grad()
def test_a_full_size_system_sounds_the_same_in_diffusers(full_size, tmp_path):
    import diffusers

    prompts = ["a dog barks"]
    ours = load_system(full_size[0])
    settings = {"duration": 0.64, "num_steps": 2, "guidance_scale": 2.5, "spacing": "leading", "seed": 3}
    sounds = ours(prompts, sampler=partial(ddim, eta=0.0), batch_size=1, **settings).waveforms
    latents = RowRandom([(3, 0)]).randn(*ours.latent_shape(sounds.shape[1]))
    del ours

    export(full_size[0], tmp_path / "theirs", to="diffusers")
    theirs = diffusers.AudioLDMPipeline.from_pretrained(tmp_path / "theirs")
    expected = theirs(
        prompts,
        audio_length_in_s=0.64,
        num_inference_steps=2,
        guidance_scale=2.5,
        latents=latents,
        output_type="pt",
    ).audios
    assert expected.std() > 0.01
    assert (sounds - expected).abs().max() < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_a_full_size_clap_embeds_the_same_in_transformers(full_size, tmp_path):
    import transformers

    ours = load_network(full_size[0] / "clap.safetensors")
    export(full_size[0] / "clap.safetensors", tmp_path / "theirs", to="transformers")
    theirs = transformers.ClapModel.from_pretrained(tmp_path / "theirs")
    generator = torch.Generator().manual_seed(0)
    mel = 20 * torch.randn(1, 1, 1001, 64, generator=generator) - 40
    expected = theirs.get_audio_features(mel, is_longer=torch.tensor([[False]])).pooler_output
    assert (ours.embed_mel(mel, torch.tensor([False])) - expected).abs().max() < 1e-5
    tokens, mask = torch.randint(2, 300, (2, 9), generator=generator), torch.ones(2, 9, dtype=torch.bool)
    expected = theirs.get_text_features(tokens, mask.long()).pooler_output
    assert (ours.embed_text(tokens, mask) - expected).abs().max() < 1e-5
