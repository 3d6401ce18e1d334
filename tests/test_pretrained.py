"""Our own weights files: what goes in comes out, and what does not belong is refused by name."""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import torch
import toys
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import ldm_audio
from ldm_audio.diffusion.samplers import ddim
from ldm_audio.errors import InputError, RunError
from ldm_audio.pretrained import load_network, load_system, save_network, save_weights

RECIPES = {
    "unet": toys.UNET_RECIPE,
    "vae": toys.VAE_RECIPE,
    "vocoder": toys.VOCODER_RECIPE,
    "clap": toys.CLAP_RECIPE,
}
SAMPLING = {
    "duration": 0.16, "num_steps": 3, "guidance_scale": 2.5, "sampler": partial(ddim, eta=0.0),
    "spacing": "leading", "seed": 3, "batch_size": 2,
}  # fmt: skip
PROVENANCE = {"run": "a run", "seed": 0}


def outputs(name: str, network: nn.Module) -> tuple[torch.Tensor, ...]:
    """What a network says to some input."""
    generator = torch.Generator().manual_seed(1)
    noise = partial(torch.randn, generator=generator)
    with torch.no_grad():
        if name == "unet":
            return (network(noise(2, 4, 4, 8), torch.tensor([3, 700]), noise(2, 12)),)
        if name == "vae":
            posterior = network.encode(noise(2, 16, 8))
            return *posterior, network.decode(posterior.mean)
        if name == "vocoder":
            return (network(noise(2, 16, 4)),)
        tokens, mask = toys.tokenizer()(["a dog barks", "rain"])
        return network(0.3 * noise(2, toys.SAMPLES), tokens, mask)


def made(name: str) -> nn.Module:
    network = toys.randomise(getattr(toys, name)()).eval()
    for buffer in network.buffers():  # batch norm's running statistics
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return network


def saved(folder: Path, name: str = "vae") -> Path:
    path = folder / f"{name}.safetensors"
    save_network(made(name), path, recipe=RECIPES[name], provenance=PROVENANCE, licence="CC0")
    return path


def rewritten(path: Path, *, header: dict | None = None, drop: str = "", shape: str = "") -> Path:
    """The same file with another header, without a tensor, or with one of another shape."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors.pop(drop, None)
    if shape:
        tensors[shape] = tensors[shape][:1].clone()
    metadata = metadata | (header or {})
    save_file(tensors, path, metadata={key: text for key, text in metadata.items() if text is not None})
    return path


# --- one network -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_a_network_comes_back_with_equal_outputs_frozen_and_in_eval_mode(name, tmp_path):
    network = made(name)
    path = saved(tmp_path, name)
    for loaded in (load_network(path), ldm_audio.load(str(path))):
        for ours, theirs in zip(outputs(name, loaded), outputs(name, network), strict=True):
            assert torch.equal(ours, theirs)
        assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
        assert not any(p.is_meta for p in (*loaded.parameters(), *loaded.buffers()))
        assert loaded.recipe == RECIPES[name] and loaded.provenance == PROVENANCE
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_the_header_says_how_to_build_it_where_it_is_from_and_what_it_allows(tmp_path):
    with safe_open(saved(tmp_path), framework="pt") as file:
        header = file.metadata()
    assert header["format"] == "ldm_audio.network/1" and header["licence"] == "CC0"
    assert json.loads(header["recipe"]) == toys.VAE_RECIPE and json.loads(header["provenance"]) == PROVENANCE


def test_loading_draws_no_random_numbers(tmp_path):
    path = saved(tmp_path)
    state = torch.get_rng_state()
    load_network(path)
    assert torch.equal(state, torch.get_rng_state())


def test_a_failed_write_keeps_the_previous_file(tmp_path, monkeypatch):
    path = saved(tmp_path)
    before = path.read_bytes()

    def half(file, expected, tensors, header):
        Path(file).write_bytes(before[:100])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ldm_audio.pretrained.write_safetensors", half)
    with pytest.raises(RunError, match="No space left"):
        save_network(made("vae"), path, recipe=toys.VAE_RECIPE, provenance=None)
    assert path.read_bytes() == before and [file.name for file in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.nn.Linear",
        "ldm_audio.quickstart.quickstart",
        "ldm_audio.audio.io.os.system",  # what our modules import
        "ldm_audio.audio.io.write_wav",  # a function of ours that does something
        "ldm_audio.models.vae.rearrange",
        "ldm_audio.models.nothing.Here",
        "ldm_audio.models.vae.Nothing",
    ],
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_recipe_builds_nothing_but_our_own_networks(target, nested, tmp_path):
    recipe = copy.deepcopy(toys.CLAP_RECIPE)
    (recipe["audio_tower"] if nested else recipe)["_target_"] = target
    path = rewritten(saved(tmp_path, "clap"), header={"recipe": json.dumps(recipe)})
    with pytest.raises(
        InputError, match=rf"clap\.safetensors: its config makes no network \({target} is not one of this"
    ):
        load_network(path)


@pytest.mark.parametrize(
    "value",
    [
        "${oc.decode:'1'}",  # evaluated it would make this very network
        "${oc.env:HOME}",
        "${oc.create:{_target_:os.getcwd}}",
        "${oc.decode:'{_target_: os.getcwd}'}",
    ],
)
def test_a_recipe_is_not_evaluated(value, tmp_path):
    recipe = toys.VAE_RECIPE | {"channel_mults": [value, 2]}
    path = rewritten(saved(tmp_path), header={"recipe": json.dumps(recipe)})
    with pytest.raises(InputError, match=r"vae\.safetensors: its config makes no network \(.*str"):
        load_network(path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda path: rewritten(path, header={"format": "ldm_audio.network/9"}),
            "format ldm_audio.network/9",
        ),
        (lambda path: path.write_bytes(path.read_bytes()[:1000]), "safetensors"),
        (lambda path: path.write_bytes(b""), "safetensors"),
        (lambda path: path.write_text("no weights at all"), "safetensors"),
        (lambda path: rewritten(path, drop="decoder.conv_in.bias"), r"decoder\.conv_in\.bias"),
        (lambda path: rewritten(path, shape="decoder.conv_in.weight"), r"decoder\.conv_in\.weight"),
        (
            lambda path: rewritten(path, header={"recipe": json.dumps(toys.VAE_RECIPE | {"depth": 2})}),
            "depth",
        ),
        (lambda path: rewritten(path, header={"recipe": "{"}), "holds no recipe and provenance in JSON"),
        (lambda path: rewritten(path, header={"provenance": None}), "holds no recipe and provenance in JSON"),
        (lambda path: rewritten(path, header={"recipe": "[3]"}), "its recipe names no network"),
        (lambda path: path.unlink(), "no such"),
    ],
    ids=[
        "format",
        "truncated",
        "empty",
        "text",
        "missing",
        "misshapen",
        "recipe",
        "no JSON",
        "no provenance",
        "a list",
        "absent",
    ],
)
def test_what_is_no_whole_weights_file_of_ours_is_refused_by_name(damage, message, tmp_path):
    path = saved(tmp_path)
    damage(path)
    with pytest.raises(InputError, match=message) as error:
        load_network(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


# --- a system ----------------------------------------------------------------------------------------------


@pytest.fixture
def system(tmp_path) -> tuple[toys.LatentDiffusionObjective, Path]:
    """A trained objective and the folder that it leaves."""
    parts = {name: made(name) for name in RECIPES}
    for name in ("vae", "clap", "vocoder"):
        parts[name].provenance = {"run": name}
    objective = toys.diffusion_objective(**parts, allow_random_frozen=False)
    objective.latent_scale.fill_(0.7)
    save_weights(
        objective, tmp_path, system={"mel": toys.MEL, "schedule": toys.SCHEDULE}, provenance=PROVENANCE
    )
    return objective, tmp_path


def test_a_system_comes_back_with_equal_sound(system):
    objective, folder = system
    names = ["clap.safetensors", "system.json", "tokenizer.json", "unet.safetensors", "vae.safetensors"]
    assert sorted(path.name for path in folder.iterdir()) == [*names, "vocoder.safetensors"]
    pipeline = ldm_audio.load(str(folder))
    assert pipeline.latent_scale == pytest.approx(0.7)
    sounds = pipeline(["a dog barks", "rain"], **SAMPLING)

    parts = {name: getattr(objective, name) for name in (*RECIPES, "tokenizer", "schedule", "mel")}
    expected = type(pipeline)(**parts, latent_scale=float(objective.latent_scale))
    difference = sounds.waveforms - expected(["a dog barks", "rain"], **SAMPLING).waveforms
    assert difference.abs().max() < 1e-4  # where weights lie in memory changes the last bits of a product
    assert sounds.waveforms.std() > 0.02
    assert pipeline.vae.provenance == {"run": "vae"} and pipeline.unet.provenance == PROVENANCE


def test_frozen_parts_are_written_once_and_the_rest_every_time(system):
    objective, folder = system
    objective.vae.requires_grad_(False).post_quant_conv.bias.fill_(9.0)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with torch.no_grad():
        objective.unet.conv_in.bias.fill_(9.0)
    objective.latent_scale.fill_(0.5)
    save_weights(
        objective, folder, system={"mel": toys.MEL, "schedule": toys.SCHEDULE}, provenance=PROVENANCE
    )
    changed = {path.name for path in folder.iterdir() if path.read_bytes() != before[path.name]}
    assert changed == {"unet.safetensors", "system.json"}


def test_another_vocoder_may_take_the_place_of_the_systems_own(system, tmp_path):
    _, folder = system
    other = tmp_path / "other" / "vocoder.safetensors"
    save_network(toys.vocoder(), other, recipe=toys.VOCODER_RECIPE, provenance=None)
    (folder / "vocoder.safetensors").unlink()
    pipeline = load_system(str(folder), vocoder=str(other))
    assert pipeline.vocoder.provenance is None


def test_a_folder_that_is_no_system_is_refused(tmp_path):
    for call in (ldm_audio.load, load_system):
        with pytest.raises(
            InputError, match=rf"{tmp_path}: holds neither system\.json, model_index\.json nor"
        ):
            call(str(tmp_path))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda folder: (folder / "system.json").write_text("{"), r"system\.json"),
        (lambda folder: (folder / "system.json").write_text('{"format": "theirs/2"}'), "format theirs/2"),
        (lambda folder: (folder / "vae.safetensors").unlink(), r"vae\.safetensors: no such"),
        (lambda folder: (folder / "tokenizer.json").unlink(), r"tokenizer\.json"),
    ],
    ids=["no json", "format", "lost part", "lost tokenizer"],
)
def test_a_damaged_system_is_refused_by_name(damage, message, system):
    _, folder = system
    damage(folder)
    with pytest.raises(InputError, match=message) as error:
        load_system(str(folder))
    assert "\n" not in str(error.value)
