import copy
from collections import Counter

import pytest
import torch
from torch import nn

from ldm_audio.convert.diffusers import unet_arguments, unet_rules
from ldm_audio.convert.rules import apply_rules, shapes_of
from ldm_audio.models.unet import UNet

torch.set_num_threads(1)

FULL = {
    "in_channels": 8,
    "out_channels": 8,
    "channels": 128,
    "channel_mults": [1, 2, 3, 5],
    "num_res_blocks": 2,
    "attention_levels": [False, True, True, True],
    "num_heads": [4, 8, 12, 20],
    "transformer_depth": 1,
    "transformers_per_block": 1,
    "embed_dim": 512,
    "embed_mode": "concat",
    "context_dim": None,
    "norm_groups": 32,
    "dropout": 0.0,
}
TOY = FULL | {
    "in_channels": 4,
    "out_channels": 4,
    "channels": 8,
    "channel_mults": [1, 2, 3],
    "norm_groups": 4,
}
TOY |= {"attention_levels": [False, True, True], "num_heads": [1, 2, 4], "embed_dim": 6}


def randomise(module: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)


def norm_eps(module: nn.Module) -> Counter:
    """How many group and layer norms have which epsilon, by width."""
    norms = [part for part in module.modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm)]
    return Counter((type(norm), len(norm.weight), norm.eps) for norm in norms)


def toy(**changes) -> UNet:
    unet = UNet(**TOY | changes).eval()
    randomise(unet, seed=0)
    return unet


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "changes, parameters, tensors",
    [
        ({}, 185_036_552, 690),
        ({"channels": 192, "num_heads": [6, 12, 18, 30]}, 415_954_568, 690),
        ({"channels": 256}, 739_139_080, 690),
        ({"embed_mode": "add"}, 180_776_712, 690),
        ({"in_channels": 16, "out_channels": 16, "transformers_per_block": 2}, 262_699_152, 1106),
        ({"embed_dim": None, "context_dim": 1024, "transformers_per_block": 2}, 265_531_016, 1104),
    ],
    ids=["S", "M", "L", "S with addition", "48 kHz", "text context"],
)
def test_full_sizes_are_those_of_the_originals(changes, parameters, tensors):
    with torch.device("meta"):
        unet = UNet(**FULL | changes)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(unet.state_dict()) == tensors


AUDIOLDM = {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [8, 16, 24],
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": [8, 16, 24],
    "attention_head_dim": [1, 2, 4],
    "class_embed_type": "simple_projection",
    "projection_class_embeddings_input_dim": 6,
    "class_embeddings_concat": True,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_head_dim": 8},
        {"class_embeddings_concat": False},
        {"transformer_layers_per_block": 2, "layers_per_block": 1},
        {"cross_attention_dim": 10},
        {"cross_attention_dim": 10, "class_embed_type": None, "class_embeddings_concat": False},
    ],
    ids=["audioldm", "8 heads everywhere", "addition", "depth 2", "context", "context alone"],
)
def test_unet_equals_diffusers_at_every_length(changes):
    from diffusers import UNet2DConditionModel

    config = AUDIOLDM | changes
    reference = UNet2DConditionModel(**config).eval()
    randomise(reference, seed=0)
    arguments = unet_arguments(config)
    unet = UNet(**arguments).eval()
    unet.load_state_dict(apply_rules(unet_rules(), reference.state_dict(), shapes_of(unet)))

    timestep = torch.tensor([3, 981])
    embed = None if arguments["embed_dim"] is None else noise(2, 6, seed=2)
    context = mask = None
    if arguments["context_dim"] is not None:
        context, mask = noise(2, 5, 10, seed=3), torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    assert norm_eps(unet) == norm_eps(reference)  # too small a difference to show in the outputs
    for size in ((8, 4), (12, 8), (7, 4), (13, 5), (1, 1)):
        zt = noise(2, 4, *size)
        with torch.no_grad():
            theirs = reference(
                zt, timestep, context, class_labels=embed, encoder_attention_mask=mask, return_dict=False
            )[0]
            ours = unet(zt, timestep, embed, context, mask)
        assert theirs.abs().max() > 0.1
        assert (ours - theirs).abs().max() <= 1e-5, size


def test_number_of_heads_matters():
    """Why the published diffusers folders, 8 heads everywhere, differ from the original checkpoints."""
    unet = toy()
    other = UNet(**TOY | {"num_heads": [1, 8, 8]}).eval()
    other.load_state_dict(unet.state_dict())
    inputs = noise(1, 4, 8, 4), torch.tensor([5]), noise(1, 6)
    assert (unet(*inputs) - other(*inputs)).abs().max() > 1e-3


@pytest.mark.parametrize("per_block", [1, 2])
def test_new_network_predicts_zero_and_its_blocks_are_identities(per_block):
    unet = UNet(**TOY | {"transformers_per_block": per_block})
    zt, timestep, embed = noise(2, 4, 8, 4), torch.tensor([0, 999]), noise(2, 6)
    assert unet(zt, timestep, embed).count_nonzero() == 0
    for block in (unet.down[1].blocks[1], unet.mid[0], unet.mid[1]):
        channels = block.res.conv2.out_channels
        x = noise(2, channels, 4, 2)
        assert torch.equal(block(x, noise(2, 64), None, None), x)


def test_masked_tokens_have_no_effect_and_the_others_do():
    unet = toy(context_dim=10)
    zt, timestep, embed, context = noise(2, 4, 8, 4), torch.tensor([5, 900]), noise(2, 6), noise(2, 5, 10)
    mask = torch.tensor([[True] * 3 + [False] * 2] * 2)
    expected = unet(zt, timestep, embed, context[:, :3])
    torch.testing.assert_close(unet(zt, timestep, embed, context, mask), expected, atol=1e-5, rtol=0)
    assert (unet(zt, timestep, embed, context) - expected).abs().max() > 1e-3


def test_row_without_any_token_stays_finite():
    unet = toy(context_dim=10)
    mask = torch.tensor([[True] * 5, [False] * 5])
    out = unet(noise(2, 4, 8, 4), torch.tensor([5, 900]), noise(2, 6), noise(2, 5, 10), mask)
    assert out.isfinite().all()


def test_first_of_several_transformers_sees_no_context():
    unet = toy(context_dim=10, transformers_per_block=2)
    first, second = unet.mid[0].transformers
    assert first.layers[0].attn2.to_k.in_features == 24
    assert second.layers[0].attn2.to_k.in_features == 10
    zt, timestep, embed = noise(1, 4, 8, 4), torch.tensor([5]), noise(1, 6)
    change = unet(zt, timestep, embed, noise(1, 5, 10)) - unet(zt, timestep, embed, noise(1, 5, 10, seed=9))
    assert change.abs().max() > 1e-3


def test_first_level_may_be_wider_than_the_base():
    unet = toy(channel_mults=[2, 2, 3])
    assert unet(noise(1, 4, 7, 5), torch.tensor([5]), noise(1, 6)).shape == (1, 4, 7, 5)


def test_rows_are_independent():
    unet = toy()
    zt, timestep, embed = noise(3, 4, 7, 5), torch.tensor([1, 500, 999]), noise(3, 6)
    alone = torch.cat([unet(zt[i : i + 1], timestep[i : i + 1], embed[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(unet(zt, timestep, embed), alone, atol=1e-5, rtol=0)


def test_activation_checkpointing_changes_no_gradient_and_can_be_switched_off():
    unet = toy(context_dim=10, dropout=0.3).train()
    inputs = noise(2, 4, 7, 5), torch.tensor([5, 900]), noise(2, 6), noise(2, 5, 10), torch.ones(2, 5).bool()
    blocks = sum(len(level.blocks) for level in (*unet.down, *unet.up)) + len(unet.mid)
    calls = []
    for module in unet.modules():
        if type(module).__name__ == "Block":
            module.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients(network: UNet) -> list[torch.Tensor]:
        calls.clear()
        torch.manual_seed(7)  # dropout
        network.zero_grad()
        network(*inputs).square().mean().backward()
        return [parameter.grad.clone() for parameter in network.parameters()]

    plain = gradients(unet)
    assert len(calls) == blocks
    unet.set_activation_checkpointing(True)
    checkpointed = gradients(unet)
    assert len(calls) == 2 * blocks
    unet.set_activation_checkpointing(False)
    again = gradients(unet)
    assert len(calls) == blocks
    for a, b, c in zip(plain, checkpointed, again):
        assert torch.equal(a, b) and torch.equal(a, c)


def test_every_parameter_gets_a_gradient():
    unet = toy(transformers_per_block=2, context_dim=10)
    unet(noise(2, 4, 8, 4), torch.tensor([5, 900]), noise(2, 6), noise(2, 5, 10)).square().mean().backward()
    idle = [name for name, p in unet.named_parameters() if p.grad is None or p.grad.count_nonzero() == 0]
    assert not idle


def test_state_holds_parameters_only_and_copies_are_equal():
    unet = toy()
    assert dict(unet.named_buffers()) == {}
    inputs = noise(1, 4, 8, 4), torch.tensor([5]), noise(1, 6)
    assert torch.equal(copy.deepcopy(unet)(*inputs), unet(*inputs))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"num_heads": [1, 2]}, "3 channel_mults, 3 attention_levels, 2 num_heads"),
        ({"num_heads": [1, 2, 5]}, "width 24 is not divisible by 5 heads"),
        ({"embed_mode": "film"}, "'film'"),
        ({"embed_mode": "attend", "context_dim": 10}, "no context_dim, got embed_dim 6 and context_dim 10"),
        ({"embed_mode": "attend", "embed_dim": None}, "needs an embed_dim"),
        ({"channels": 9, "norm_groups": 3}, "even width, got 9"),
    ],
)
def test_impossible_sizes_are_refused_with_their_numbers(changes, message):
    with pytest.raises(ValueError, match=message):
        UNet(**TOY | changes)


@torch.no_grad()
def test_an_embed_that_is_attended_to_is_a_context_of_one_token():
    attends, with_context = toy(embed_mode="attend"), toy(embed_dim=None, context_dim=6)
    assert attends.state_dict().keys() == with_context.state_dict().keys()
    zt, timestep, embed = noise(2, 4, 8, 4), torch.tensor([5, 900]), noise(2, 6)
    expected = with_context(zt, timestep, context=6**0.5 * embed[:, None])
    assert torch.equal(attends(zt, timestep, embed), expected)
    assert (attends(zt, timestep, -embed) - expected).abs().max() > 0.01
    with pytest.raises(ValueError, match="embed_dim is 6, but embed is missing"):
        attends(zt, timestep)
    with pytest.raises(ValueError, match="context_dim is None, but context is given"):
        attends(zt, timestep, embed, embed[:, None])


def test_missing_and_unexpected_conditions_are_refused():
    zt, timestep, embed, context = noise(1, 4, 8, 4), torch.tensor([5]), noise(1, 6), noise(1, 5, 10)
    with pytest.raises(ValueError, match="embed_dim is 6, but embed is missing"):
        toy()(zt, timestep)
    with pytest.raises(ValueError, match="embed_dim is None, but embed is given"):
        toy(embed_dim=None)(zt, timestep, embed)
    with pytest.raises(ValueError, match="context_dim is None, but context is given"):
        toy()(zt, timestep, embed, context)
    with pytest.raises(ValueError, match="context_dim is 10, but context is missing"):
        toy(context_dim=10)(zt, timestep, embed)
