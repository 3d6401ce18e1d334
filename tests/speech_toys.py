"""Tiny networks of the text-to-speech-tokens system, and transformers' CLVP of the same sizes.

Heads of the towers have 64 channels, of which 32 turn, so that a wrong split would show.
"""

import torch
from foreign import randomise
from torch import Tensor, nn

from ldm_audio.convert import clvp as table
from ldm_audio.convert.rules import apply_rules, shapes_of
from ldm_audio.models.clvp import CLVP
from ldm_audio.models.speech_lm import SpeechLM
from ldm_audio.pretrained import build

TOWER = {
    "_target_": "ldm_audio.models.clvp.Tower", "vocab_size": 256, "dim": 128, "depth": 2, "num_heads": 2,
    "ff_dim": 48, "rotary_dim": 32, "joint_dim": 24, "norm": "eps", "dropout": 0.0,
}  # fmt: skip
CLVP_RECIPE = {
    "_target_": "ldm_audio.models.clvp.CLVP", "text_tower": TOWER,
    "speech_tower": {**TOWER, "vocab_size": 30, "ff_dim": 40},
}  # fmt: skip
SPEECH_LM_RECIPE = {
    "_target_": "ldm_audio.models.speech_lm.SpeechLM", "n_mels": 80, "dim": 64, "depth": 3, "num_heads": 2,
    "ff_dim": 96, "conditioning_depth": 2, "text_vocab_size": 256, "text_start": 255, "text_stop": 0,
    "num_tokens": 30, "max_text_positions": 24, "max_speech_positions": 33, "text_head": True,
    "dropout": 0.0,
}  # fmt: skip
DVAE_RECIPE = {
    "_target_": "ldm_audio.models.dvae.DVAE", "n_mels": 80, "channels": 8, "num_levels": 2,
    "num_res_blocks": 2, "num_tokens": 30, "codebook_dim": 6, "codebook_decay": 0.9,
}  # fmt: skip


def network(recipe: dict, *, seed: int = 0) -> nn.Module:
    """Every parameter and buffer at random, in eval mode."""
    made = build(recipe, source="a toy").to_empty(device="cpu")
    made = randomise(made, seed=seed)
    if hasattr(made, "codebook"):
        made.codebook.start_at(torch.randn_like(made.codebook.vectors))
    return made


def their_config():
    import transformers

    return transformers.ClvpConfig(**table.config_of(CLVP_RECIPE, SPEECH_LM_RECIPE))


def theirs(seed: int = 0):
    """transformers' whole model, every parameter at random, in eval mode."""
    import transformers

    peer = transformers.ClvpModelForConditionalGeneration(their_config())
    frequencies = {k: v.clone() for k, v in peer.state_dict().items() if k.endswith("inv_freq")}
    peer = randomise(peer, seed=seed)
    peer.load_state_dict(frequencies, strict=False)
    # A flat distribution would let a small error change the most likely token, and a norm near 0 hide one.
    peer.speech_decoder_model.lm_head.weight.data *= 3
    return peer.eval()


def clvp_from(state: dict[str, Tensor]) -> CLVP:
    ours = network(CLVP_RECIPE)
    taken = {k: v for k, v in state.items() if not k.startswith(table.SPEECH_LM_PREFIXES)}
    rules = table.clvp_rules(CLVP_RECIPE)
    ours.load_state_dict(apply_rules(rules, taken, shapes_of(ours)))
    return ours


def speech_lm_from(state: dict[str, Tensor]) -> SpeechLM:
    ours = network({**SPEECH_LM_RECIPE, "text_head": False})
    taken = {k: v for k, v in state.items() if k.startswith(table.SPEECH_LM_PREFIXES)}
    ours.load_state_dict(apply_rules(table.speech_lm_rules(), taken, shapes_of(ours)))
    return ours
