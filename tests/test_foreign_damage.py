"""Damaged foreign weights: an error that names what is wrong, never a crash and never a silent success."""

import json
import shutil
from pathlib import Path

import foreign
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import ldm_audio
from ldm_audio import pretrained
from ldm_audio.convert import hifigan
from ldm_audio.convert.originals import open_original
from ldm_audio.convert.stored import Tensors
from ldm_audio.errors import InputError

FUZZ = settings(
    max_examples=12, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)  # fmt: skip


@pytest.fixture(scope="module")
def states():
    """By kind: an original's whole state, and the networks that it holds."""
    parts = foreign.networks()
    clap = foreign.laion_state(parts["clap"])
    return {
        "checkpoint": (foreign.checkpoint_state(parts), parts),
        "laion": (foreign.with_prefix(clap, "module."), {"clap": parts["clap"]}),
        "vae": (foreign.vae_state(parts["vae"]), {"vae": parts["vae"]}),
        "vocoder": (dict(parts["vocoder"].state_dict()), {"vocoder": parts["vocoder"]}),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A diffusers pipeline's folder."""
    path = tmp_path_factory.mktemp("pipeline")
    foreign.their_pipeline("AudioLDMPipeline").save_pretrained(path)
    return path


def damage(state: dict, draw) -> tuple[dict, str]:
    """The same state with one tensor dropped, renamed, reshaped or of another kind, and what was done."""
    state = dict(state)
    name = draw(st.sampled_from(sorted(state)))
    tensor = state.pop(name)
    how = draw(
        st.sampled_from(["drop", "rename", "swap", "flatten", "grow", "cut", "scalar", "whole numbers"])
    )
    if how in ("flatten", "scalar") and tensor.ndim < 2:
        how = "grow"  # a vector is flat already
    if how == "rename":
        cut = draw(st.integers(0, len(name)))
        state[name[:cut] + draw(st.sampled_from([".", "x", "0", ".weight"])) + name[cut:]] = tensor
    if how == "swap":
        other = draw(st.sampled_from(sorted(state)))
        state[name], state[other] = state[other], tensor
    reshaped = {"flatten": tensor.flatten(), "grow": tensor[None], "scalar": torch.tensor(1.0)}
    if how in reshaped:
        state[name] = reshaped[how]
    if how == "cut":
        state[name] = tensor[: draw(st.integers(0, len(tensor) - 1))] if tensor.ndim else tensor[None]
    if how == "whole numbers":
        state[name] = tensor.long() if tensor.is_floating_point() else tensor.float()
    return state, how


def loads_right_or_complains(state: dict, parts: dict, how: str = "") -> bool:
    """Whether it complained; AssertionError where something loads that differs from the undamaged network."""
    try:
        source = open_original(Path("a file"), Tensors.of(state), ema=True)
        found = {name: pretrained.build_part(part) for name, part in source.parts.items()}
    except InputError as error:
        assert "\n" not in str(error) and str(error).startswith("a file") and len(str(error)) < 1500
        return True
    assert found.keys() == parts.keys()
    for name, network in found.items():
        expected = parts[name].state_dict()
        got = network.state_dict()
        assert got.keys() == expected.keys()
        differing = [key for key in got if not torch.equal(got[key], expected[key])]
        # Tensors of one shape that have changed places are beyond any check of names and shapes; and a text
        # table cut short is that of a smaller vocabulary or of shorter texts, which its file alone states.
        if how == "cut":
            differing = [key for key in differing if not key.endswith("_embed.weight")]
        assert not differing or how == "swap", (name, differing)
    return False


@pytest.mark.parametrize("examples", [12, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["checkpoint", "laion", "vae", "vocoder"])
def test_a_damaged_state_is_never_loaded_in_silence(states, monkeypatch, kind, examples):
    foreign.allow_toy_vocoder(monkeypatch)
    state, parts = states[kind]
    assert not loads_right_or_complains(state, parts)
    complaints = []

    @settings(FUZZ, max_examples=examples)
    @given(data=st.data())
    def fuzz(data):
        changed, how = damage(state, data.draw)
        complaints.append(loads_right_or_complains(changed, parts, how))

    fuzz()
    assert sum(complaints) > len(complaints) // 3


@pytest.mark.parametrize("examples", [8, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["unet", "vae", "vocoder", "text_encoder"])
def test_a_damaged_folder_is_never_loaded_in_silence(folder, tmp_path, part, examples):
    copy = shutil.copytree(folder / part, tmp_path / part)
    (file,) = copy.glob("*.safetensors")
    state, network = load_file(file), ldm_audio.load(copy).state_dict()

    @settings(FUZZ, max_examples=examples)
    @given(data=st.data())
    def fuzz(data):
        changed, how = damage(state, data.draw)
        save_file({n: t.contiguous().clone() for n, t in changed.items()}, file)
        try:
            got = ldm_audio.load(copy).state_dict()
        except InputError as error:
            assert "\n" not in str(error) and str(copy) in str(error)
        else:
            assert how == "swap" or all(torch.equal(got[name], network[name]) for name in network)

    fuzz()


VALUES = [None, True, 0, -1, 3, 2.5, "x", [], [0], [3, 5], {}, {"a": 1}]


@pytest.mark.parametrize("examples", [6, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("part", ["unet", "vae", "vocoder", "text_encoder", "scheduler", "."])
def test_a_damaged_config_is_never_a_crash(folder, tmp_path, part, examples):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (file,) = [f for f in (copy / part).glob("*.json") if f.name != "preprocessor_config.json"]
    config = json.loads(file.read_text())

    @settings(FUZZ, max_examples=examples)
    @given(key=st.sampled_from(sorted(config)), value=st.sampled_from(VALUES), drop=st.booleans())
    def fuzz(key, value, drop):
        changed = {k: v for k, v in config.items() if k != key} | ({} if drop else {key: value})
        file.write_text(json.dumps(changed))
        try:
            ldm_audio.load(copy)
        except InputError as error:
            assert "\n" not in str(error) and "copy" in str(error)

    fuzz()


@pytest.mark.parametrize(
    "part, key, value, told",
    [
        ("text_encoder", "vocab_size", None, r"text_encoder/config\.json: vocab_size=None: expected a whole"),
        ("unet", "layers_per_block", [1, 2], r"unet/config\.json: layers_per_block=\[1, 2\]: expected one"),
        ("vae", "scaling_factor", "x", r"vae/config\.json: scaling_factor='x': expected a number"),
        ("vocoder", "sampling_rate", 0, r"vocoder/config\.json: sampling_rate=0: expected a whole number"),
        ("scheduler", "beta_end", True, r"scheduler_config\.json: beta_end=True: expected a number"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named_with_its_file(folder, tmp_path, part, key, value, told):
    copy = shutil.copytree(folder, tmp_path / "copy")
    (file,) = (copy / part).glob("*config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
    with pytest.raises(InputError, match=told):
        ldm_audio.load(copy)


@pytest.mark.parametrize("file", ["vae.safetensors", "vae.ckpt", "g_legacy", "model.bin", "index"])
def test_a_truncated_file_is_an_error_that_names_it(states, folder, tmp_path, monkeypatch, file):
    monkeypatch.setattr(hifigan, "RELEASED", ())
    state = dict(states["vae"][0])
    path = tmp_path / file
    if file == "vae.safetensors":
        save_file(state, path)
    elif file == "g_legacy":
        torch.save({"generator": states["vocoder"][0]}, path, _use_new_zipfile_serialization=False)
        (tmp_path / "config.json").write_text(json.dumps(foreign.VOCODER_JSON))
    elif file == "index":
        shutil.copytree(folder / "vae", path)
        whole = path / "diffusion_pytorch_model.safetensors"
        weight_map = dict.fromkeys(load_file(whole), whole.name)
        whole = whole.rename(path / "shard.safetensors")
        weight_map = dict.fromkeys(weight_map, whole.name)
        index = path / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"weight_map": weight_map}))
    else:
        torch.save(state, path)
    ldm_audio.load(path)
    target = path / "diffusion_pytorch_model.safetensors.index.json" if file == "index" else path
    content = target.read_bytes()

    @FUZZ
    @given(length=st.integers(0, len(content) - 1))
    def fuzz(length):
        target.write_bytes(content[:length])
        with pytest.raises(InputError, match=target.name) as caught:
            ldm_audio.load(path)
        assert "\n" not in str(caught.value)

    fuzz()


@pytest.mark.parametrize("name", ["../vae.safetensors", "/etc/passwd", "a/b.safetensors", "..\\x", "..", 3])
def test_an_index_that_leads_out_of_its_folder_is_refused(folder, tmp_path, name):
    copy = shutil.copytree(folder / "vae", tmp_path / "vae")
    weights = copy / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    weights.rename(tmp_path / "vae.safetensors")
    index = copy / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, name)}))
    with pytest.raises(InputError, match=r"index\.json: (names .* not a file beside it|has no weight_map)"):
        ldm_audio.load(copy)


def test_shards_that_lack_what_the_index_says_are_refused(folder, tmp_path):
    copy = shutil.copytree(folder / "vae", tmp_path / "vae")
    weights = copy / "diffusion_pytorch_model.safetensors"
    names = list(load_file(weights))
    weights.rename(copy / "shard.safetensors")
    index = copy / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys([*names, "extra"], "shard.safetensors")}))
    with pytest.raises(InputError, match=r"shard\.safetensors: holds other tensors than .* says: extra"):
        ldm_audio.load(copy)


def test_a_tower_of_another_size_than_its_config_says_names_the_first_tensors(tmp_path):
    network = foreign.their_clap(text_only=False)
    network.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["audio_config"] |= {"patch_embeds_hidden_size": 32, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config))
    told = r"wrong shape: audio_tower\.patch_embed\.norm\.\w+ \[16\] from .*, expected \[32\].* and \d+ more"
    with pytest.raises(InputError, match=told):
        ldm_audio.load(tmp_path)


def test_several_variants_and_no_plain_file_are_listed(folder, tmp_path):
    copy = shutil.copytree(folder / "vae", tmp_path / "vae")
    weights = copy / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, copy / "diffusion_pytorch_model.fp16.safetensors")
    weights.rename(copy / "diffusion_pytorch_model.non_ema.safetensors")
    with pytest.raises(InputError, match="holds only the variants fp16, non_ema; leave one of them"):
        ldm_audio.load(copy)


def test_a_target_outside_the_networks_in_a_header_is_refused(tmp_path):
    for target in ("os.system", "ldm_audio.files.write_text", "ldm_audio.modelsX.a"):
        header = {
            "format": pretrained.FORMAT, "recipe": json.dumps({"_target_": target}), "provenance": "{}",
            "licence": "",
        }  # fmt: skip
        save_file({"a": torch.zeros(1)}, tmp_path / "net.safetensors", metadata=header)
        with pytest.raises(InputError, match=rf"{target} is not one of this package's networks"):
            ldm_audio.load(tmp_path / "net.safetensors")


@pytest.mark.parametrize("content", [[1, 2], {"a": 3}, {}, {"state_dict": {}}, 5, {"x": torch.zeros(2)}])
def test_files_of_no_known_kind_say_what_they_hold(tmp_path, content):
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(
        InputError, match=r"file\.pt: (expected a state dict|not a state dict|no kind of weights)"
    ):
        ldm_audio.load(tmp_path / "file.pt")


def test_other_pipelines_and_networks_are_refused_by_name(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    with pytest.raises(InputError, match="a StableDiffusionPipeline, expected AudioLDMPipeline or MusicLDM"):
        ldm_audio.load(tmp_path)
    (tmp_path / "model_index.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(InputError, match=r"config\.json: 'bert' is not one of"):
        ldm_audio.load(tmp_path)
