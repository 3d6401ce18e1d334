import foreign
import pytest
import torch

from ldm_audio.convert import audioldm, diffusers
from ldm_audio.convert.rules import apply_rules, invert_rules, shapes_of
from ldm_audio.errors import InputError
from ldm_audio.models.unet import UNet
from ldm_audio.models.vae import VAE

torch.set_num_threads(1)

NAMES = ("num_res_blocks", "attention_levels", "transformers_per_block")


def released(size: str, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors below `prefix` of a released checkpoint, on the meta device, the vocoder's left out."""
    found = foreign.below(foreign.key_list(f"audioldm-{size}-full"), prefix)
    return {name: tensor for name, tensor in found.items() if not name.startswith("vocoder.")}


def shapes(state: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def unet_rules(arguments: dict) -> list:
    return audioldm.unet_rules(**{name: arguments[name] for name in NAMES})


def filled(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A state whose tensors all differ."""
    return {name: torch.full(shape, float(i)) for i, (name, shape) in enumerate(shapes_of(module).items())}


@pytest.mark.parametrize(
    "size, channels, num_heads",
    [("s", 128, [4, 8, 12, 20]), ("m", 192, [6, 12, 18, 30]), ("l", 256, [4, 8, 12, 20])],
)
def test_sizes_of_a_released_unet_are_read_off_its_shapes(size, channels, num_heads):
    assert audioldm.unet_arguments(shapes(released(size, audioldm.UNET_PREFIX))) == {
        "in_channels": 8,
        "out_channels": 8,
        "channels": channels,
        "channel_mults": [1, 2, 3, 5],
        "num_res_blocks": 2,
        "attention_levels": [False, True, True, True],
        "num_heads": num_heads,
        "transformer_depth": 1,
        "transformers_per_block": 1,
        "embed_dim": 512,
        "embed_mode": "concat",
        "context_dim": None,
        "norm_groups": 32,
        "dropout": 0.0,
    }


def test_sizes_of_the_released_vae_are_read_off_its_shapes():
    assert audioldm.vae_arguments(shapes(released("s", audioldm.VAE_PREFIX))) == {
        "in_channels": 1,
        "channels": 128,
        "channel_mults": [1, 2, 4],
        "num_res_blocks": 2,
        "latent_channels": 8,
        "norm_groups": 32,
        "dropout": 0.0,
    }


def test_every_unet_tensor_goes_where_diffusers_own_converter_puts_it():
    """Shapes cannot tell two equal layers apart: here each tensor is a number of its own."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    state = released("s", audioldm.UNET_PREFIX)
    arguments = audioldm.unet_arguments(shapes(state))
    tokens = {name: torch.tensor(number) for number, name in enumerate(state)}
    ours = apply_rules(unet_rules(arguments), tokens, None)

    checkpoint = foreign.with_prefix(tokens, audioldm.UNET_PREFIX)
    theirs = convert_ldm_unet_checkpoint(checkpoint, {"layers_per_block": 2})
    for kind in ("weight", "bias"):
        theirs[f"class_embedding.{kind}"] = tokens[f"film_emb.{kind}"]  # AudioLDM's own, unknown to it
    theirs = apply_rules(diffusers.unet_rules(), theirs, None)
    assert len(ours) == 690
    assert ours == theirs


def test_every_vae_tensor_goes_where_diffusers_own_converter_puts_it():
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    names = released("s", audioldm.VAE_PREFIX)
    tokens = {name: torch.full((1, 1, 1, 1), number) for number, name in enumerate(names)}
    ours = apply_rules(audioldm.vae_rules(num_levels=3), tokens, None)

    checkpoint = foreign.with_prefix(tokens, audioldm.VAE_PREFIX)
    blocks = {"down_block_types": [""] * 3, "up_block_types": [""] * 3}
    theirs = apply_rules(diffusers.vae_rules(), convert_ldm_vae_checkpoint(checkpoint, blocks), None)
    assert len(ours) == 204
    assert {name: token.item() for name, token in ours.items()} == {
        name: token.item() for name, token in theirs.items()
    }


@pytest.mark.parametrize("size", ["s", "m", "l"])
def test_every_unet_tensor_has_its_average_under_the_generated_key(size):
    state = foreign.key_list(f"audioldm-{size}-full")
    unet = foreign.below(state, audioldm.UNET_PREFIX)
    keys = {name: audioldm.ema_key(name) for name in unet}
    assert len(set(keys.values())) == len(unet) == 690
    assert all(state[key].shape == unet[name].shape for name, key in keys.items())
    averages = {name for name in state if name.startswith("model_ema.")}
    assert averages - set(keys.values()) == {"model_ema.decay", "model_ema.num_updates"}


TOY = {
    "in_channels": 4,
    "out_channels": 6,
    "channels": 32,
    "channel_mults": [1, 2, 3],
    "num_res_blocks": 2,
    "attention_levels": [False, True, True],
    "num_heads": [1, 2, 3],
    "transformer_depth": 1,
    "transformers_per_block": 1,
    "embed_dim": 6,
    "embed_mode": "concat",
    "context_dim": None,
    "norm_groups": 32,
    "dropout": 0.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"transformers_per_block": 2, "transformer_depth": 2},
        {"embed_mode": "add", "num_res_blocks": 1},
        {"embed_dim": None, "embed_mode": "add", "context_dim": 64, "transformers_per_block": 2},
        {"attention_levels": [True, False, False]},
        {"channel_mults": [2], "attention_levels": [True], "num_heads": [2]},
    ],
    ids=["plain", "48 kHz", "addition", "context", "attention above", "one level"],
)
def test_export_to_the_original_unet_comes_back_equal(changes):
    arguments = TOY | changes
    unet = UNet(**arguments)
    state = filled(unet)
    rules = unet_rules(arguments)
    original = invert_rules(rules, state)
    assert audioldm.unet_arguments(shapes(original)) == arguments
    back = apply_rules(rules, original, shapes_of(unet))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_second_transformer_and_upsampler_take_the_originals_places():
    arguments = TOY | {"transformers_per_block": 2}
    original = invert_rules(unet_rules(arguments), filled(UNet(**arguments)))
    assert "input_blocks.4.2.norm.weight" in original
    assert "middle_block.3.in_layers.0.weight" in original
    assert "output_blocks.2.3.conv.weight" in original
    assert "output_blocks.5.3.conv.weight" in original


@pytest.mark.parametrize("mults", [[1, 2, 4], [1, 2, 2, 4], [1]])
def test_export_to_the_original_vae_comes_back_equal(mults):
    arguments = {"in_channels": 1, "channels": 32, "channel_mults": mults, "num_res_blocks": 2}
    arguments |= {"latent_channels": 3, "norm_groups": 32, "dropout": 0.0}
    vae = VAE(**arguments)
    state = filled(vae)
    rules = audioldm.vae_rules(num_levels=len(mults))
    original = invert_rules(rules, state)
    assert original["encoder.mid.attn_1.q.weight"].shape == (32 * mults[-1], 32 * mults[-1], 1, 1)
    assert audioldm.vae_arguments(shapes(original)) == arguments
    original["loss.discriminator.main.0.weight"] = torch.zeros(1)
    back = apply_rules(rules, original, shapes_of(vae))
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], state[name]) for name in state)


def test_decoder_levels_of_the_original_count_from_the_output():
    arguments = {"in_channels": 1, "channels": 32, "channel_mults": [1, 2, 4], "num_res_blocks": 2}
    vae = VAE(**arguments, latent_channels=3, norm_groups=32, dropout=0.0)
    state = filled(vae)
    original = invert_rules(audioldm.vae_rules(num_levels=3), state)
    assert torch.equal(original["decoder.up.2.upsample.conv.bias"], state["decoder.up.0.resample.bias"])
    assert torch.equal(original["decoder.up.0.block.1.conv1.bias"], state["decoder.up.2.blocks.1.conv1.bias"])
    assert "decoder.up.0.upsample.conv.bias" not in original


def test_files_of_another_layout_are_refused_by_the_tensor_they_lack():
    with pytest.raises(InputError, match=r"no tensor named input_blocks\.0\.0\.weight"):
        audioldm.unet_arguments({"conv_in.weight": (8, 4, 3, 3)})
    with pytest.raises(InputError, match=r"no tensor named encoder\.conv_in\.weight"):
        audioldm.vae_arguments({})
