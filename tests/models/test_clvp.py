"""The ranking towers against transformers', and what they promise beside."""

import pytest
import speech_toys as toys
import torch
from torch import nn

from ldm_audio.errors import InputError
from ldm_audio.models.clvp import RMSNorm


def tokens(vocab_size: int, *shape: int) -> torch.Tensor:
    return torch.randint(vocab_size, shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_embeddings_and_logits_equal_transformers():
    peer = toys.theirs()
    ours = toys.clvp_from(peer.state_dict())
    text, speech = tokens(256, 3, 11), tokens(30, 4, 17)
    expected_text = peer.text_encoder_model(input_ids=text).embeds
    expected_speech = peer.speech_encoder_model(input_ids=speech).embeds
    assert (ours.text_tower(text) - expected_text).abs().max() <= 1e-5
    assert (ours.speech_tower(speech) - expected_speech).abs().max() <= 1e-5
    units = (nn.functional.normalize(e, dim=-1) for e in (expected_text, expected_speech))
    expected = peer.logit_scale.exp() * next(units) @ next(units).T
    assert (ours.scores(text, speech) - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_the_two_norms_differ_by_what_was_predicted():
    x = torch.randn(50, 64)
    floor, eps = (RMSNorm(dim=64, kind=kind)(x) for kind in ("floor", "eps"))
    relative = ((floor - eps) / floor).abs()
    assert torch.allclose(relative, 5e-6 / x.square().mean(-1, keepdim=True).expand_as(x), rtol=0.3)
    assert RMSNorm(dim=64, kind="floor")(torch.zeros(1, 64)).isfinite().all()
    peer = nn.functional.normalize(x, dim=-1) * 64**0.5  # the original divides by the length
    assert (floor - peer).abs().max() < 1e-5


@torch.no_grad()
def test_padding_changes_nothing_and_order_does():
    ours = toys.network(toys.CLVP_RECIPE)
    text = tokens(256, 2, 9)
    padded = torch.cat([text, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    mask = torch.arange(13) < 9
    alone, masked = ours.embed_text(text), ours.embed_text(padded, mask.expand(2, 13))
    assert torch.allclose(alone, masked, atol=1e-6)
    assert not torch.allclose(alone, ours.embed_text(padded), atol=1e-3)
    assert not torch.allclose(alone, ours.embed_text(text.flip(1)), atol=1e-3)


def test_activation_checkpointing_changes_no_gradient():
    ours = toys.network(toys.CLVP_RECIPE).train()
    text, speech = tokens(256, 2, 5), tokens(30, 2, 6)
    gradients = []
    for enabled in (False, True):
        ours.set_activation_checkpointing(enabled)
        ours.zero_grad()
        ours.scores(text, speech).diagonal().sum().backward()
        gradients.append([p.grad.clone() for p in ours.parameters()])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))


def test_what_is_no_token_is_refused():
    ours = toys.network(toys.CLVP_RECIPE)
    with pytest.raises(InputError, match="token 30: expected 0 to 29"):
        ours.embed_speech(torch.tensor([[3, 30]]))
    with pytest.raises(InputError, match="token -1: expected 0 to 255"):
        ours.embed_text(torch.tensor([[-1]]))
    with pytest.raises(InputError, match="no tokens"):
        ours.embed_text(torch.zeros(1, 0, dtype=torch.int64))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_heads": 3}, "dim=128 is not divisible by num_heads=3"),
        ({"rotary_dim": 65}, "rotary_dim=65: expected an even number up to 64"),
        ({"norm": "layer"}, "norm='layer': expected 'eps' or 'floor'"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        toys.network({**toys.CLVP_RECIPE, "text_tower": {**toys.TOWER, **change}})
