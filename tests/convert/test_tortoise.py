"""TorToise's own files and transformers' CLVP: full-size key lists, and toy weights there and back."""

import ast
import gzip
import json
from pathlib import Path

import pytest
import speech_toys as toys
import torch
from einops import rearrange

from ldm_audio.convert import clvp, tortoise
from ldm_audio.convert.parts import Part
from ldm_audio.convert.rules import apply_rules, invert_rules, shapes_of
from ldm_audio.convert.stored import Tensors
from ldm_audio.errors import InputError
from ldm_audio.pretrained import build, state_of

FIXTURES = Path(__file__).parents[1] / "fixtures"


def key_lists(name: str) -> dict[str, Tensors]:
    """File name -> its tensors on the meta device, of a list that holds several files."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    with gzip.open(FIXTURES / f"{name}.txt.gz", "rt") as lines:
        for line in lines:
            if line.startswith(("## ", "# HF ")):
                file = line.lstrip("# ").split()[1 if line.startswith("# HF") else 0].rstrip(":")
                found[file] = {}
            elif line.strip() and not line.startswith("#"):
                key, rest = line.split(" ", 1)
                shape = ast.literal_eval(rest[: rest.index(")") + 1])
                found[file][key] = torch.empty(shape, device="meta")
    return {file: Tensors.of(state) for file, state in found.items()}


def numbers(part: Part) -> int:
    """After a strict conversion on the meta device: the parameters of the network."""
    part.check(state_of(part))
    return sum(p.numel() for p in build(part.recipe, source=part.origin).parameters())


def test_the_released_originals_convert_strictly():
    files = key_lists("tortoise")
    state = files["autoregressive.pth"]
    masks = {
        f"gpt.h.{i}.attn.{name}": torch.empty(shape, dtype=torch.uint8, device="meta")
        for i in range(30)
        for name, shape in (("bias", (1, 1, 1012, 1012)), ("masked_bias", ()))
    }
    recipe = tortoise.speech_lm_recipe(state.shapes)
    rules = tortoise.speech_lm_rules(num_heads=recipe["num_heads"])
    for tensors in (state, Tensors(state.entries | Tensors.of(masks).entries)):
        assert numbers(Part(recipe, rules, tensors, "autoregressive.pth")) == 421_526_786
    assert (recipe["depth"], recipe["num_heads"], recipe["num_tokens"]) == (30, 16, 8192)

    state = files["clvp2.pth"]
    recipe = tortoise.clvp_recipe(state.shapes)
    rules = tortoise.clvp_rules(depth=recipe["text_tower"]["depth"])
    assert numbers(Part(recipe, rules, state, "clvp2.pth")) == 243_846_145

    state = files["dvae.pth"]
    recipe = tortoise.dvae_recipe(state.shapes)
    rules = tortoise.dvae_rules(num_levels=recipe["num_levels"], num_res_blocks=recipe["num_res_blocks"])
    assert numbers(Part(recipe, rules, state, "dvae.pth")) == 51_567_184


@pytest.mark.parametrize("speech_vocab, total", [(256, 659_015_683), (8192, 665_110_531)])
def test_transformers_clvp_converts_strictly_at_full_size(speech_vocab, total):
    """256 is the default of its config, 8192 what the released weights have."""
    state = dict(key_lists("clvp-hf")["ClvpModelForConditionalGeneration(ClvpConfig())"])
    assert len(state) == 1003
    state["speech_encoder_model.token_embedding.weight"] = torch.empty(speech_vocab, 768, device="meta")
    recipes = clvp.recipes_of({"speech_config": {"vocab_size": speech_vocab}})
    speech_lm = {k: v for k, v in state.items() if k.startswith(clvp.SPEECH_LM_PREFIXES)}
    ranker = {k: v for k, v in state.items() if k not in speech_lm}
    rules = clvp.clvp_rules(recipes["clvp"])
    parts = [
        Part(recipes["speech_lm"], clvp.speech_lm_rules(), Tensors.of(speech_lm), "a folder"),
        Part(recipes["clvp"], rules, Tensors.of(ranker), "a folder"),
    ]
    assert sum(map(numbers, parts)) == total


def test_transformers_weights_come_back_bit_for_bit():
    peer = toys.theirs().state_dict()
    ranker, speech_lm = toys.clvp_from(peer), toys.speech_lm_from(peer)
    rules = clvp.clvp_rules(toys.CLVP_RECIPE)
    back = invert_rules(rules, ranker.state_dict())
    back |= invert_rules(clvp.speech_lm_rules(), speech_lm.state_dict())
    assert back.keys() == peer.keys()
    for name, tensor in peer.items():
        assert torch.equal(tensor, back[name]), name


def test_a_config_there_and_back_is_the_same():
    ours = {"clvp": toys.CLVP_RECIPE, "speech_lm": {**toys.SPEECH_LM_RECIPE, "text_head": False}}
    config = clvp.config_of(**ours)
    assert clvp.recipes_of(json.loads(json.dumps(config))) == ours
    assert clvp.recipes_of(toys.their_config().to_dict()) == ours


ORIGINAL_SPEECH_LM = {**toys.SPEECH_LM_RECIPE, "dim": 128, "num_heads": 2, "dropout": 0.1}
ORIGINAL_TOWERS = {"dropout": 0.1, "norm": "floor"}
ORIGINAL_CLVP = {
    **toys.CLVP_RECIPE,
    "text_tower": toys.CLVP_RECIPE["text_tower"] | ORIGINAL_TOWERS,
    "speech_tower": toys.CLVP_RECIPE["speech_tower"] | ORIGINAL_TOWERS,
}


@pytest.mark.parametrize(
    "recipe, rules, read_off",
    [
        (ORIGINAL_SPEECH_LM, tortoise.speech_lm_rules(num_heads=2), tortoise.speech_lm_recipe),
        (ORIGINAL_CLVP, tortoise.clvp_rules(depth=2), tortoise.clvp_recipe),
        (
            toys.DVAE_RECIPE | {"codebook_decay": 0.99},
            tortoise.dvae_rules(num_levels=2, num_res_blocks=2),
            tortoise.dvae_recipe,
        ),
    ],
    ids=["autoregressive", "clvp2", "dvae"],
)
def test_originals_come_back_bit_for_bit_and_tell_their_sizes(recipe, rules, read_off):
    ours = toys.network(recipe)
    theirs = invert_rules(rules, ours.state_dict())
    assert read_off({name: tuple(tensor.shape) for name, tensor in theirs.items()}) == recipe
    again = apply_rules(rules, theirs, shapes_of(ours))
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, again[name]), name


@torch.no_grad()
def test_the_original_attention_sorts_its_rows_by_head():
    """A conditioning block written as the original has it: rows [head][q, k, v][channel], scaled twice."""
    ours = toys.network(ORIGINAL_SPEECH_LM)
    state = invert_rules(tortoise.speech_lm_rules(num_heads=2), ours.state_dict())
    x = torch.randn(2, 128, 7)
    block = "conditioning_encoder.attn.0"
    h = torch.nn.functional.group_norm(x, 32, state[f"{block}.norm.weight"], state[f"{block}.norm.bias"])
    h = torch.nn.functional.conv1d(h, state[f"{block}.qkv.weight"], state[f"{block}.qkv.bias"])
    q, k, v = rearrange(h, "b (h c) n -> (b h) c n", h=2).split(64, dim=1)
    weights = (q * 64**-0.25).transpose(1, 2) @ (k * 64**-0.25)
    h = rearrange(v @ weights.softmax(-1).transpose(1, 2), "(b h) c n -> b (h c) n", h=2)
    weight, bias = (state[f"{block}.proj_out.{k}"] for k in ("weight", "bias"))
    expected = x + torch.nn.functional.conv1d(h, weight, bias)
    assert (ours.conditioning.blocks[0](x) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "config, message",
    [
        ({"text_config": {"summary_type": "last"}}, "text_config.summary_type='last': expected 'mean'"),
        ({"decoder_config": {"activation_function": "relu"}}, "decoder_config.activation_function='relu'"),
        ({"decoder_config": {"eos_token_id": 5}}, "start and stop are not the last two tokens"),
    ],
)
def test_settings_without_an_equal_are_refused(config, message):
    with pytest.raises(InputError, match=message):
        clvp.recipes_of(config)


def test_sizes_without_an_equal_are_refused():
    turned = {**toys.CLVP_RECIPE, "speech_tower": {**toys.TOWER, "rotary_dim": 64}}
    with pytest.raises(InputError, match=r"speech_tower\.rotary_dim=64"):
        clvp.config_of(turned, toys.SPEECH_LM_RECIPE)
    with pytest.raises(InputError, match=r"no tensor named text_emb\.weight"):
        tortoise.clvp_recipe({})
    with pytest.raises(InputError, match="width 66: expected a multiple of 64"):
        tortoise.heads_of(66)
