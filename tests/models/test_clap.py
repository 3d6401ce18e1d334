"""CLAP as a whole against transformers' ClapModel, at toy size, everything randomised."""

import math

import pytest
import torch

from ldm_audio.audio.clap_mel import ClapMel
from ldm_audio.convert.clap import transformers_rules
from ldm_audio.convert.rules import apply_rules, shapes_of
from ldm_audio.errors import InputError
from ldm_audio.models.clap import CLAP
from ldm_audio.models.htsat import HTSAT
from ldm_audio.models.roberta import Roberta

PATTERNS = [[True, False, True], [False, False, True], [False, False, False]]
LAYER_NORM_EPS = 1e-12


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def toy(*, fusion: str | None, with_audio: bool = True) -> CLAP:
    front_end = ClapMel(
        sample_rate=16000,
        n_fft=512,
        hop_length=160,
        n_mels=32,
        fmin=50,
        fmax=8000,
        max_samples=16000,
        fusion=fusion is not None,
        filling="repeatpad",
    )
    audio_tower = HTSAT(
        n_mels=32,
        spec_size=128,
        patch_size=4,
        patch_stride=4,
        dim=16,
        depths=[2, 2, 2],
        num_heads=[2, 4, 4],
        window_size=8,
        mlp_ratio=4.0,
        qkv_bias=True,
        dropout=0.0,
        drop_path=0.1,
        fusion=fusion,
        spec_augment=True,
    )
    text_tower = Roberta(
        vocab_size=60,
        dim=32,
        depth=2,
        num_heads=4,
        ff_dim=48,
        max_positions=40,
        pad_token=1,
        layer_norm_eps=LAYER_NORM_EPS,
        dropout=0.1,
    )
    return CLAP(
        front_end=front_end,
        audio_tower=audio_tower if with_audio else None,
        text_tower=text_tower,
        joint_dim=24,
    )


def peer(*, fusion: bool):
    """transformers' model of the same sizes with every parameter, bias and running statistic drawn anew."""
    from transformers import ClapConfig, ClapModel

    audio = {
        "num_mel_bins": 32,
        "spec_size": 128,
        "patch_embeds_hidden_size": 16,
        "hidden_size": 64,
        "depths": [2, 2, 2],
        "num_attention_heads": [2, 4, 4],
        "enable_fusion": fusion,
        "projection_dim": 24,
    }
    text = {
        "vocab_size": 60,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
        "layer_norm_eps": LAYER_NORM_EPS,
        "projection_dim": 24,
    }
    model = ClapModel(ClapConfig(text_config=text, audio_config=audio, projection_dim=24)).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_var", "logit_scale_a", "logit_scale_t")):
            tensor.uniform_(0.5, 2.0)
        elif name.endswith("running_mean"):
            tensor.normal_(std=0.5)
        elif tensor.is_floating_point():
            tensor.normal_(std=0.25)
        elif name.endswith("num_batches_tracked"):
            tensor.fill_(3)
    return model


def converted(model, *, fusion: bool) -> CLAP:
    ours = toy(fusion="aff_2d" if fusion else None).eval()
    ours.load_state_dict(apply_rules(transformers_rules(), model.state_dict(), shapes_of(ours)))
    return ours


def texts() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(11) < torch.tensor([11, 3, 7])[:, None]
    return torch.where(mask, torch.randint(2, 60, mask.shape), 1), mask


@torch.no_grad()
def largest_difference(ours: CLAP, theirs, mel: torch.Tensor, is_longer: torch.Tensor) -> float:
    """Over both embeddings and both matrices of logits."""
    tokens, mask = texts()
    audio_embed, text_embed = ours.embed_mel(mel, is_longer), ours.embed_text(tokens, mask)
    expected = theirs(
        input_ids=tokens, attention_mask=mask.long(), input_features=mel, is_longer=is_longer[:, None]
    )
    pairs = [
        (audio_embed, expected.audio_embeds),
        (text_embed, expected.text_embeds),
        (ours.logit_scale_audio.exp() * audio_embed @ text_embed.T, expected.logits_per_audio),
        (ours.logit_scale_text.exp() * text_embed @ audio_embed.T, expected.logits_per_text),
    ]
    return max((one - other).abs().max().item() for one, other in pairs)


@pytest.mark.parametrize("num_frames", [100, 501, 512])
def test_unfused_equals_transformers(num_frames):
    theirs = peer(fusion=False)
    mel = torch.randn(3, 1, num_frames, 32) * 20 - 40
    assert largest_difference(converted(theirs, fusion=False), theirs, mel, torch.zeros(3).bool()) <= 1e-5


@pytest.mark.parametrize("is_longer", PATTERNS)
def test_fused_equals_transformers(is_longer):
    theirs = peer(fusion=True)
    mel = torch.randn(3, 4, 501, 32) * 20 - 40
    assert largest_difference(converted(theirs, fusion=True), theirs, mel, torch.tensor(is_longer)) <= 1e-5


def test_fusing_matters_at_these_sizes():
    """Otherwise the patterns above would prove nothing."""
    ours = converted(peer(fusion=True), fusion=True)
    mel = torch.randn(3, 4, 501, 32) * 20 - 40
    outcomes = [ours.embed_mel(mel, torch.tensor(pattern)) for pattern in PATTERNS]
    assert (outcomes[0] - outcomes[1])[0].abs().max() > 1e-3
    assert (outcomes[1] - outcomes[2])[2].abs().max() > 1e-3


@pytest.mark.parametrize("fusion", [None, "aff_2d"])
@pytest.mark.parametrize("num_samples", [5000, 16000, 50000])
def test_waveforms_of_any_length_become_unit_vectors(fusion, num_samples):
    clap = toy(fusion=fusion).eval()
    audio_embed, text_embed = clap(torch.randn(3, num_samples), *texts())
    assert audio_embed.shape == text_embed.shape == (3, 24)
    for embed in (audio_embed, text_embed):
        assert torch.allclose(embed.norm(dim=-1), torch.ones(3), atol=1e-6)
    mel, is_longer = clap.front_end(torch.ones(1, num_samples))
    assert torch.equal(clap.embed_audio(torch.ones(1, num_samples)), clap.embed_mel(mel, is_longer))


def test_scales_start_at_the_released_temperature():
    clap = toy(fusion=None)
    assert clap.logit_scale_audio.item() == pytest.approx(math.log(1 / 0.07))
    assert clap.logit_scale_text.item() == pytest.approx(math.log(1 / 0.07))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reaches_every_parameter_but_the_scales(checkpointing):
    clap = toy(fusion="aff_2d").train()
    clap.set_activation_checkpointing(checkpointing)
    audio_embed, text_embed = clap(torch.randn(3, 50000), *texts())
    (audio_embed @ text_embed.T).square().sum().backward()
    idle = {name for name, parameter in clap.named_parameters() if parameter.grad is None}
    assert idle == {"logit_scale_audio", "logit_scale_text"}


def test_embeddings_keep_float64_and_leave_bfloat16():
    clap = toy(fusion="aff_2d").eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        embeds = clap(torch.randn(3, 50000), *texts())
    assert [embed.dtype for embed in embeds] == [torch.float32] * 2
    embeds = clap.double()(torch.randn(3, 50000).double(), *texts())
    assert [embed.dtype for embed in embeds] == [torch.float64] * 2


def test_the_text_half_stands_alone():
    clap = toy(fusion=None, with_audio=False).eval()
    clap.set_activation_checkpointing(True)
    assert clap.embed_text(*texts()).shape == (3, 24)
    assert not any(name.startswith("audio") for name in clap.state_dict())
    with pytest.raises(InputError, match="no audio tower"):
        clap.embed_audio(torch.randn(1, 16000))
