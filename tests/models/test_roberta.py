"""The text tower against transformers' RobertaModel."""

import pytest
import torch

from ldm_audio.convert.clap import roberta_rules
from ldm_audio.convert.rules import apply_rules, shapes_of
from ldm_audio.errors import InputError
from ldm_audio.models.roberta import Roberta

SIZES = {
    "vocab_size": 50,
    "dim": 32,
    "depth": 3,
    "num_heads": 4,
    "ff_dim": 40,
    "max_positions": 20,
    "pad_token": 1,
    "layer_norm_eps": 1e-5,
    "dropout": 0.1,
}


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return torch.where(mask, torch.randint(2, 50, mask.shape), 1), mask


def test_equals_transformers():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=40,
        max_position_embeddings=20,
        type_vocab_size=1,
        layer_norm_eps=1e-5,
    )
    peer = RobertaModel(config).eval()
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    ours = Roberta(**SIZES).eval()
    ours.load_state_dict(apply_rules(roberta_rules(), peer.state_dict(), shapes_of(ours)))
    tokens, mask = batch([18, 1, 7, 2])
    hidden, pooled = ours(tokens, mask)
    expected = peer(input_ids=tokens, attention_mask=mask.long())
    # The padded places as well, whose position is the padding's own.
    assert (hidden - expected.last_hidden_state).abs().max() <= 1e-5
    assert (pooled - expected.pooler_output).abs().max() <= 1e-5


def test_base_has_the_released_number_of_parameters():
    """All of RoBERTa-base with its pooler."""
    with torch.device("meta"):
        base = Roberta(
            **{
                **SIZES,
                "vocab_size": 50265,
                "dim": 768,
                "depth": 12,
                "num_heads": 12,
                "ff_dim": 3072,
                "max_positions": 514,
            }
        )
    assert sum(p.numel() for p in base.parameters()) == 124_645_632
    assert base.max_tokens == 512 and not list(base.buffers())


def test_padding_changes_nothing():
    model = Roberta(**SIZES).eval()
    tokens, mask = batch([9, 4])
    alone, _ = model(tokens[1:, :4], mask[1:, :4])
    together, pooled = model(tokens, mask)
    assert torch.allclose(together[1, :4], alone[0], atol=1e-6)
    assert torch.allclose(pooled[1], model(tokens[1:, :4], mask[1:, :4])[1][0], atol=1e-6)


def test_activation_checkpointing_changes_no_gradient():
    model = Roberta(**SIZES).train()
    tokens, mask = batch([9, 4])
    gradients = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        model.zero_grad()
        torch.manual_seed(1)
        model(tokens, mask)[1].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*gradients))


def test_padding_embeddings_start_at_zero():
    model = Roberta(**SIZES)
    assert not model.token_embed.weight[1].any() and not model.position_embed.weight[1].any()
    assert model.token_embed.weight[2].any()


def test_too_many_tokens_are_refused():
    model = Roberta(**SIZES)
    model(*batch([18]))
    with pytest.raises(InputError, match="19 text tokens: expected at most 18"):
        model(*batch([19]))
    with pytest.raises(InputError, match="dim=32 is not divisible by num_heads=5"):
        Roberta(**{**SIZES, "num_heads": 5})
