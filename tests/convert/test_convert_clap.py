"""CLAP's two foreign layouts: every released name has its place, and both load the same network."""

import gzip
import re
from pathlib import Path

import pytest
import torch

from ldm_audio.audio.clap_mel import ClapMel
from ldm_audio.convert import laion
from ldm_audio.convert.clap import transformers_recipe, transformers_rules, transformers_text_rules
from ldm_audio.convert.rules import apply_rules, invert_rules, prefixed, shapes_of
from ldm_audio.errors import InputError
from ldm_audio.models.clap import CLAP
from ldm_audio.models.htsat import HTSAT
from ldm_audio.models.roberta import Roberta

FIXTURES = Path(__file__).parents[1] / "fixtures"
DTYPES = {"float32": torch.float32, "int64": torch.int64}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def key_lists(name: str) -> list[dict[str, torch.Tensor]]:
    """The sections of a list of released names and shapes, as tensors on the meta device."""
    sections: list[dict[str, torch.Tensor]] = [{}]
    for line in gzip.decompress((FIXTURES / name).read_bytes()).decode().splitlines():
        if line.startswith("# entries"):
            sections.append({})
        if not line or line.startswith("#"):
            continue
        key, shape, dtype, _ = line.split("\t")
        size = [int(number) for number in re.findall(r"\d+", shape)]
        sections[-1][key] = torch.empty(size, dtype=DTYPES[dtype], device="meta")
    return [section for section in sections if section]


def transformers_lists() -> dict[str, dict[str, torch.Tensor]]:
    tiny, extra, base = key_lists("clap-hf.txt.gz")
    return {"tiny": tiny, "fused": {**tiny, **extra}, "base": base}


def laion_lists() -> dict[str, dict[str, torch.Tensor]]:
    tiny, fused, base_audio = key_lists("clap-laion.txt.gz")
    rest = {name: tensor for name, tensor in tiny.items() if not name.startswith("audio_")}
    projection = {f"audio_projection.{i}.{k}" for i in (0, 2) for k in ("weight", "bias")}
    base_audio = {f"audio_branch.{name}": tensor for name, tensor in base_audio.items()}
    base = {**rest, **base_audio, **{name: tiny[name] for name in projection}}
    base["audio_projection.0.weight"] = torch.empty(512, 1024, device="meta")
    return {"tiny": tiny, "fused": fused, "base": base}


def build(recipe: dict) -> CLAP:
    """What Hydra does with a recipe, on the meta device."""
    parts = {
        name: {key: value for key, value in recipe[name].items() if key != "_target_"}
        for name in ("front_end", "audio_tower", "text_tower")
    }
    with torch.device("meta"):
        return CLAP(
            front_end=ClapMel(**parts["front_end"]),
            audio_tower=HTSAT(**parts["audio_tower"]),
            text_tower=Roberta(**parts["text_tower"]),
            joint_dim=recipe["joint_dim"],
        )


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def hf_config(size: str) -> tuple[dict, dict]:
    base = {"patch_embeds_hidden_size": 128, "hidden_size": 1024, "depths": [2, 2, 12, 2]}
    audio = {"tiny": {}, "fused": {"enable_fusion": True, "fusion_type": None}, "base": base}[size]
    truncation = "fusion" if size == "fused" else "rand_trunc"
    return {"audio_config": audio}, {"frequency_min": 50, "truncation": truncation}


# All of ClapModel's parameters: both towers, both projections, both scales (no buffers).
PARAMETERS = {"tiny": 153_492_890, "fused": 153_507_530, "base": 193_913_882}


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_transformers_name_has_its_place(size):
    state = transformers_lists()[size]
    ours = build(transformers_recipe(*hf_config(size)))
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[size]
    ours.load_state_dict(apply_rules(transformers_rules(), state, shapes_of(ours)), assign=True)


@pytest.mark.parametrize("size", PARAMETERS)
def test_every_laion_name_has_its_place(size):
    state = {f"module.{name}": tensor for name, tensor in laion_lists()[size].items()}
    prefix = laion.prefix_of(state)
    bare = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    ours = build(laion.clap_recipe(shapes(bare)))
    assert sum(p.numel() for p in ours.parameters()) == PARAMETERS[size]
    rules = prefixed(laion.clap_rules(), source=prefix)
    ours.load_state_dict(apply_rules(rules, state, shapes_of(ours)), assign=True)


@pytest.mark.parametrize("size", PARAMETERS)
def test_what_laion_lacks_a_config_for_is_read_off_the_shapes(size):
    from_laion = laion.clap_recipe(shapes(laion_lists()[size]))
    from_transformers = transformers_recipe(*hf_config(size))
    from_transformers["text_tower"]["layer_norm_eps"] = 1e-5  # the one difference between the two
    assert from_laion == from_transformers


@pytest.mark.parametrize("size", PARAMETERS)
def test_the_way_back_gives_every_transformers_name(size):
    state = transformers_lists()[size]
    ours = apply_rules(transformers_rules(), state, None)
    back = invert_rules(transformers_rules(), ours, shapes(state))
    assert {name: tensor.dtype for name, tensor in back.items()} == {k: v.dtype for k, v in state.items()}


def test_dropped_laion_parameters_are_heads_transforms_and_front_end():
    state = laion_lists()["tiny"]
    converted = apply_rules(laion.clap_rules(), state, None)
    kept = sum(tensor.numel() for tensor in converted.values() if tensor.is_floating_point())
    heads, transforms, front_end = 2_428_943 + 278_256, 2 * 525_312, 1_050_624 + 32_832
    statistics = 2 * 64
    assert kept == 158_334_169 - heads - transforms - front_end + statistics


def toy_config(*, fusion: bool) -> dict:
    audio = {
        "num_mel_bins": 32,
        "spec_size": 64,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 32,
        "depths": [2, 2],
        "num_attention_heads": [2, 4],
        "enable_fusion": fusion,
    }
    text = {
        "vocab_size": 60,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "layer_norm_eps": 1e-5,
    }
    return {"text_config": text, "audio_config": audio, "projection_dim": 24}


def toy_state(*, fusion: bool) -> dict[str, torch.Tensor]:
    from transformers import ClapConfig, ClapModel

    state = ClapModel(ClapConfig(**toy_config(fusion=fusion))).state_dict()
    return {k: torch.rand(v.shape) + 0.1 if v.is_floating_point() else v for k, v in state.items()}


def as_laion(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers' state under LAION's names, by plain replacement, with what LAION has besides."""
    names = [
        ("text_model.", "text_branch."),
        ("audio_model.audio_encoder.", "audio_branch."),
        ("projection.linear1", "projection.0"),
        ("projection.linear2", "projection.2"),
        ("batch_norm.", "bn0."),
        ("layernorm_before", "norm1"),
        ("layernorm_after", "norm2"),
        ("attention.self.relative", "attn.relative"),
        ("blocks.{}.attention.output.dense", "blocks.{}.attn.proj"),
        ("blocks.{}.intermediate.dense", "blocks.{}.mlp.fc1"),
        ("blocks.{}.output.dense", "blocks.{}.mlp.fc2"),
    ]
    laion = {}
    for name, tensor in state.items():
        if name.endswith(("position_ids", "token_type_ids")):
            continue
        for theirs, ours in names:
            for j in range(2):
                name = name.replace(theirs.format(j), ours.format(j))
        laion[name] = tensor
    for name in [name for name in laion if "audio_branch" in name and "self.query" in name]:
        parts = [laion.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        laion[name.replace("attention.self.query", "attn.qkv")] = torch.cat(parts)
    return {
        **laion,
        "audio_branch.spectrogram_extractor.stft.conv_real.weight": torch.zeros(3),
        "audio_branch.logmel_extractor.melW": torch.zeros(3),
        "audio_branch.layers.0.blocks.1.attn_mask": torch.zeros(3),
        "audio_branch.tscam_conv.weight": torch.zeros(3),
        "audio_branch.head.bias": torch.zeros(3),
        "text_branch.embeddings.position_ids": torch.zeros(1, 40),
        "audio_transform.sequential.3.bias": torch.zeros(3),
    }


@pytest.mark.parametrize("fusion", [False, True])
def test_both_layouts_load_the_same_network(fusion):
    state = toy_state(fusion=fusion)
    one = apply_rules(transformers_rules(), state, None)
    other = apply_rules(laion.clap_rules(), as_laion(state), None)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fusion", [False, True])
def test_the_round_trip_through_transformers_is_exact(fusion):
    state = toy_state(fusion=fusion)
    ours = build(transformers_recipe(toy_config(fusion=fusion), {}))
    there = apply_rules(transformers_rules(), state, shapes_of(ours))
    back = invert_rules(transformers_rules(), there, shapes(state))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_files_without_the_stored_constants_load_too():
    state = toy_state(fusion=False)
    slim = {k: v for k, v in state.items() if not k.endswith(("_ids", "relative_position_index"))}
    one, other = (apply_rules(transformers_rules(), s, None) for s in (state, slim))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_text_half_converts_alone_with_scales_of_its_own():
    state = {k: v for k, v in toy_state(fusion=False).items() if k.startswith("text_")}
    recipe = transformers_recipe(toy_config(fusion=False), {})
    clap = build(recipe)
    half = CLAP(front_end=clap.front_end, audio_tower=None, text_tower=clap.text_tower, joint_dim=24)
    assert apply_rules(transformers_text_rules(), state, shapes_of(half)).keys() == half.state_dict().keys()


@pytest.mark.parametrize("fusion", [None, "aff_2d", "iaff_2d", "daf_2d", "channel_map"])
def test_every_fusion_is_recognised_in_laion_files(fusion):
    """From our own tower turned round to LAION's names."""
    state = toy_state(fusion=False)
    recipe = transformers_recipe(toy_config(fusion=False), {})
    recipe["audio_tower"]["fusion"] = fusion
    recipe["front_end"]["fusion"] = fusion is not None
    clap = build(recipe)
    tower = {name: torch.empty(shape) for name, shape in shapes_of(clap.audio_tower).items()}
    files = {k: v for k, v in as_laion(state).items() if not k.startswith("audio_branch.")}
    files |= {f"audio_branch.{k}": v for k, v in invert_rules(laion.htsat_rules(), tower).items()}
    if fusion == "iaff_2d":
        files["audio_branch.patch_embed.fusion_model.global_att2.1.weight"] = torch.zeros(1)
    found = laion.clap_recipe(shapes(files))
    assert found["front_end"]["fusion"] == (fusion is not None)
    found["audio_tower"]["spec_size"] = 64
    assert found["audio_tower"] == recipe["audio_tower"]
    apply_rules(laion.clap_rules(), files, shapes_of(build(found)))


@pytest.mark.parametrize(
    ("side", "change", "told"),
    [
        ("audio_config", {"hidden_act": "relu"}, "audio_config.hidden_act='relu': expected 'gelu'"),
        ("audio_config", {"patch_stride": [4, 2]}, "audio_config.patch_stride"),
        ("audio_config", {"enable_fusion": True, "fusion_type": "channel_map"}, "channel_map"),
        ("text_config", {"type_vocab_size": 2}, "text_config.type_vocab_size=2"),
    ],
)
def test_settings_without_a_counterpart_are_refused(side, change, told):
    with pytest.raises(InputError, match=re.escape(told)):
        transformers_recipe({side: change}, {})


def test_a_state_without_clap_is_refused():
    with pytest.raises(InputError, match=r"audio_branch\.bn0\.weight, found 0"):
        laion.prefix_of(["model.diffusion_model.out.weight"])
    names = [f"{prefix}audio_branch.bn0.weight" for prefix in ("cond_stage_model.model.", "clap.model.")]
    assert laion.prefix_of(names[:1]) == "cond_stage_model.model."
    with pytest.raises(InputError, match="found 2"):
        laion.prefix_of(names)


def test_laion_files_with_other_towers_are_refused():
    state = laion_lists()["tiny"]
    without_text = {k: v for k, v in shapes(state).items() if not k.startswith("text_branch.")}
    with pytest.raises(InputError, match=r"no tensor named text_branch\.embeddings"):
        laion.clap_recipe(without_text)
