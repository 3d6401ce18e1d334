import json

import pytest
import torch
from safetensors.torch import save_file

from ldm_audio.convert import diffusers as layout
from ldm_audio.convert.rules import apply_rules, invert_rules, shapes_of
from ldm_audio.errors import InputError
from ldm_audio.models.unet import UNet
from ldm_audio.models.vae import VAE

torch.set_num_threads(1)

UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": 8,
    "channel_mults": [1, 2, 3],
    "num_res_blocks": 2,
    "attention_levels": [False, True, True],
    "num_heads": [1, 2, 4],
    "transformer_depth": 1,
    "transformers_per_block": 1,
    "embed_dim": 6,
    "embed_mode": "concat",
    "context_dim": None,
    "norm_groups": 4,
    "dropout": 0.0,
}
VAE_TOY = {
    "in_channels": 1,
    "channels": 8,
    "channel_mults": [1, 2, 4],
    "num_res_blocks": 2,
    "latent_channels": 3,
    "norm_groups": 4,
    "dropout": 0.0,
}
RELEASED_UNET = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [128, 256, 384, 640],
    "center_input_sample": False,
    "class_embed_type": "simple_projection",
    "class_embeddings_concat": True,
    "cross_attention_dim": [128, 256, 384, 640],
    "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * 3,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 8,
    "layers_per_block": 2,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 8,
    "projection_class_embeddings_input_dim": 512,
    "sample_size": 128,
    "up_block_types": ["CrossAttnUpBlock2D"] * 3 + ["UpBlock2D"],
    "use_linear_projection": False,
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def random(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / fan_in**0.5)
    return module.eval()


def write_folder(folder, config: dict, state: dict) -> None:
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def test_released_unet_config_gives_the_released_size_with_8_heads_everywhere():
    arguments = layout.unet_arguments(RELEASED_UNET)
    assert arguments["num_heads"] == [8, 8, 8, 8]
    with torch.device("meta"):
        unet = UNet(**arguments)
    assert sum(p.numel() for p in unet.parameters()) == 185_036_552


def test_full_size_unet_and_vae_map_onto_ours():
    from diffusers import AutoencoderKL, UNet2DConditionModel

    vae_arguments = VAE_TOY | {"channels": 128, "latent_channels": 8, "norm_groups": 32}
    vae_config = layout.vae_config(vae_arguments, latent_scale=0.9)
    with torch.device("meta"):
        unet, their_unet = UNet(**layout.unet_arguments(RELEASED_UNET)), UNet2DConditionModel(**RELEASED_UNET)
        vae, their_vae = VAE(**vae_arguments), AutoencoderKL.from_config(vae_config)
    for rules, ours, theirs in (
        (layout.unet_rules(), unet, their_unet),
        (layout.vae_rules(), vae, their_vae),
    ):
        converted = apply_rules(rules, theirs.state_dict(), shapes_of(ours))
        assert len(converted) == len(theirs.state_dict())
        exported = invert_rules(rules, ours.state_dict(), shapes_of(theirs))
        assert exported.keys() == theirs.state_dict().keys()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"embed_mode": "add", "transformer_depth": 2},
        {"embed_dim": None, "embed_mode": "add", "context_dim": 10},
        {"attention_levels": [False, False, False], "num_res_blocks": 1},
    ],
    ids=["audioldm", "addition", "context", "attention in the middle only"],
)
def test_diffusers_loads_an_exported_unet_and_it_computes_the_same(changes, tmp_path):
    from diffusers import UNet2DConditionModel

    arguments = UNET | changes
    unet = random(UNet(**arguments))
    config = layout.unet_config(arguments, sample_size=256)
    write_folder(tmp_path, config, invert_rules(layout.unet_rules(), unet.state_dict()))
    theirs = UNet2DConditionModel.from_pretrained(tmp_path).eval()
    assert theirs.config.sample_size == 256
    assert layout.unet_arguments(config) == arguments

    zt, timestep = noise(2, 4, 7, 5), torch.tensor([3, 900])
    embed = None if arguments["embed_dim"] is None else noise(2, 6)
    context = None if arguments["context_dim"] is None else noise(2, 5, 10)
    with torch.no_grad():
        expected = theirs(zt, timestep, context, class_labels=embed).sample
        assert (unet(zt, timestep, embed, context) - expected).abs().max() <= 1e-5


def test_diffusers_loads_an_exported_vae_and_it_computes_the_same(tmp_path):
    from diffusers import AutoencoderKL

    vae = random(VAE(**VAE_TOY))
    config = layout.vae_config(VAE_TOY, latent_scale=0.925)
    write_folder(tmp_path, config, invert_rules(layout.vae_rules(), vae.state_dict()))
    theirs = AutoencoderKL.from_pretrained(tmp_path).eval()
    assert theirs.config.scaling_factor == 0.925
    assert layout.vae_arguments(config) == VAE_TOY

    z = noise(2, 3, 6, 4)
    with torch.no_grad():
        expected = theirs.decode(z).sample[:, 0]  # (b, n, f)
        assert (vae.decode(z).mT - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("as_convolution", [False, True])
def test_old_names_of_the_vae_attention_load_too(as_convolution):
    vae = VAE(**VAE_TOY)
    present = invert_rules(layout.vae_rules(), vae.state_dict())
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for name, tensor in present.items():
        for new_name, old_name in old_names.items():
            if f".{new_name}.weight" in name and as_convolution:
                tensor = tensor[:, :, None, None]
            name = name.replace(f".{new_name}.", f".{old_name}.")
        old[name] = tensor
    assert sum(name not in present for name in old) == 16
    back = apply_rules(layout.vae_rules(), old, shapes_of(vae))
    assert all(torch.equal(back[name], tensor) for name, tensor in vae.state_dict().items())


def test_several_transformers_a_block_cannot_be_exported():
    arguments = UNET | {"transformers_per_block": 2}
    with pytest.raises(InputError, match="transformers_per_block 2"):
        layout.unet_config(arguments, sample_size=256)
    with pytest.raises(InputError, match=r"no rule takes .*transformers\.1\."):
        invert_rules(layout.unet_rules(), UNet(**arguments).state_dict())


def test_an_embed_that_is_attended_to_cannot_be_exported():
    with pytest.raises(InputError, match="embed_mode attend"):
        layout.unet_config(UNET | {"embed_mode": "attend"}, sample_size=256)


def test_base_width_must_be_the_first_level_of_an_export():
    with pytest.raises(InputError, match=r"channel_mults \[2, 2, 3\]"):
        layout.unet_config(UNET | {"channel_mults": [2, 2, 3]}, sample_size=256)


@pytest.mark.parametrize(
    "key, value",
    [
        ("freq_shift", 1),
        ("flip_sin_to_cos", False),
        ("resnet_time_scale_shift", "scale_shift"),
        ("use_linear_projection", True),
        ("class_embed_type", "timestep"),
        ("layers_per_block", [2, 3, 2, 2]),
        ("block_out_channels", [128, 200, 384, 640]),
        ("up_block_types", ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3),
        ("down_block_types", ["AttnDownBlock2D"] * 4),
    ],
)
def test_unet_settings_without_an_equal_are_refused_by_name(key, value):
    with pytest.raises(InputError, match=key if key != "down_block_types" else "AttnDownBlock2D"):
        layout.unet_arguments(RELEASED_UNET | {key: value})


@pytest.mark.parametrize(
    "key, value",
    [
        ("mid_block_add_attention", False),
        ("use_quant_conv", False),
        ("out_channels", 2),
        ("shift_factor", 0.1),
    ],
)
def test_vae_settings_without_an_equal_are_refused_by_name(key, value):
    config = layout.vae_config(VAE_TOY, latent_scale=1.0)
    with pytest.raises(InputError, match=key):
        layout.vae_arguments(config | {key: value})


def test_missing_keys_take_the_value_that_diffusers_assumes():
    import inspect

    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

    for network, table in (
        (UNet2DConditionModel, layout.UNET_SETTINGS),
        (AutoencoderKL, layout.VAE_SETTINGS),
        (DDIMScheduler, layout.SCHEDULE_SETTINGS),
    ):
        parameters = inspect.signature(network).parameters
        for key, setting in table.items():
            theirs = parameters[key].default
            assert (list(theirs) if isinstance(theirs, tuple) else theirs) == setting.default, key
