import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm_audio.convert.hifigan import (
    RELEASED,
    generator_arguments,
    generator_rules,
    released_arguments,
    speecht5_arguments,
    speecht5_config,
    speecht5_rules,
)
from ldm_audio.convert.rules import apply_rules, invert_rules, prefixed, shapes_of
from ldm_audio.errors import InputError
from ldm_audio.models.hifigan import HiFiGAN

KEYS = Path(__file__).parents[1] / "fixtures" / "keys" / "audioldm-s-full.txt.gz"
ARGUMENTS = {
    "n_mels": 6,
    "channels": 16,
    "upsample_rates": [5, 4, 2],
    "upsample_kernels": [16, 16, 8],
    "resblock_kernels": [3, 7],
    "resblock_dilations": [[1, 3], [1, 5]],
    "high_resolution": False,
}


def randomise(module: nn.Module, *, seed: int) -> nn.Module:
    """Every parameter and buffer at random, large enough for the mel to be heard in the output."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        scale = 2.0 if name.endswith("original0") else 0.2  # the norms of weight norm
        tensor.copy_(scale * torch.randn(tensor.shape, generator=generator))
    return module.eval()


def assert_same_sound(waveform: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.std() > 0.05 and expected.abs().mean() < 0.9  # neither constant nor driven into the tanh
    assert (waveform - expected).abs().max() <= 1e-5


def speecht5(*, weight_norm: bool) -> nn.Module:
    from transformers import SpeechT5HifiGan, SpeechT5HifiGanConfig

    reference = SpeechT5HifiGan(SpeechT5HifiGanConfig(**speecht5_config(ARGUMENTS, sample_rate=16000)))
    if weight_norm:
        reference.apply_weight_norm()
    return randomise(reference, seed=1)


def loaded(arguments: dict, rules: list, state: dict) -> HiFiGAN:
    model = HiFiGAN(**arguments).eval()
    model.load_state_dict(apply_rules(rules, state, shapes_of(model)))
    return model


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("ours_normed", [False, True])
@torch.no_grad()
def test_output_equals_transformers(weight_norm, ours_normed):
    reference = speecht5(weight_norm=weight_norm)
    arguments = speecht5_arguments(reference.config.to_dict())
    assert arguments == ARGUMENTS
    model = loaded(arguments, speecht5_rules(n_mels=6), reference.state_dict())
    if ours_normed:
        model.add_weight_norm()
    mel = torch.randn(2, 6, 11, generator=torch.Generator().manual_seed(2))
    expected = reference(mel.mT)  # (b, s)
    assert_same_sound(model(mel).squeeze(1), expected)


@torch.no_grad()
def test_an_exported_folder_loads_in_transformers_and_sounds_the_same(tmp_path):
    from safetensors.torch import save_file
    from transformers import SpeechT5HifiGan

    model = randomise(HiFiGAN(**ARGUMENTS), seed=3)
    state = invert_rules(speecht5_rules(n_mels=6), model.state_dict())
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = speecht5_config(ARGUMENTS, sample_rate=16000)
    (tmp_path / "config.json").write_text(json.dumps(config))
    reference, report = SpeechT5HifiGan.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    mel = torch.randn(1, 6, 9, generator=torch.Generator().manual_seed(4))
    assert_same_sound(reference(mel.mT), model(mel).squeeze(1))


@pytest.mark.parametrize("spelling", ["weight_g", "parametrizations", "plain"])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module.", "first_stage_model.vocoder."])
@torch.no_grad()
def test_original_files_load_in_every_spelling(spelling, prefix):
    source = HiFiGAN(**ARGUMENTS)
    if spelling != "plain":
        source.add_weight_norm()
    randomise(source, seed=5)
    state = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    if spelling == "weight_g":
        state = {
            name.replace("parametrizations.weight.original0", "weight_g").replace(
                "parametrizations.weight.original1", "weight_v"
            ): tensor
            for name, tensor in state.items()
        }
    rules = generator_rules()
    if prefix.startswith("first_stage"):
        rules = prefixed(rules, source=prefix)
    model = loaded(ARGUMENTS, rules, state)
    mel = torch.randn(1, 6, 7, generator=torch.Generator().manual_seed(6))
    assert_same_sound(model(mel), source(mel))


def test_the_released_key_list_loads_strictly():
    with gzip.open(KEYS, "rt") as file:
        rows = [line.split() for line in file if line.startswith("first_stage_model.vocoder.")]
    state = {name: torch.empty(json.loads(shape), device="meta") for name, shape in rows}
    assert len(state) == 194
    shapes = {name: tensor.shape for name, tensor in state.items()}
    with torch.device("meta"):
        model = HiFiGAN(**released_arguments(shapes, origin="audioldm-s-full.ckpt"))
    rules = prefixed(generator_rules(), source="first_stage_model.vocoder.")
    converted = apply_rules(rules, state, shapes_of(model), origin="audioldm-s-full.ckpt")
    model.load_state_dict(converted, assign=True)
    assert set(invert_rules(rules, model.state_dict())) == set(state)


@pytest.mark.parametrize("arguments", RELEASED, ids=["16k", "48k"])
@pytest.mark.parametrize("weight_norm", [False, True])
def test_released_layouts_are_known_by_their_shapes(arguments, weight_norm):
    with torch.device("meta"):
        model = HiFiGAN(**arguments)
        if weight_norm:
            model.add_weight_norm()
    assert released_arguments(shapes_of(model), origin="generator.ckpt") == arguments


def test_an_unknown_layout_asks_for_its_config():
    with pytest.raises(InputError, match=r"own\.ckpt: 6 mel bins, 16 channels .* give the JSON config"):
        released_arguments(shapes_of(HiFiGAN(**ARGUMENTS)), origin="own.ckpt")
    with pytest.raises(InputError, match=r"own\.ckpt: not a HiFi-GAN generator"):
        released_arguments({"weight": (1,)}, origin="own.ckpt")


def test_the_original_json_gives_the_arguments_and_refuses_what_is_not_built():
    config = {
        "resblock": "1",
        "num_mels": 6,
        "upsample_initial_channel": 16,
        "upsample_rates": [5, 4, 2],
        "upsample_kernel_sizes": [16, 16, 8],
        "resblock_kernel_sizes": [3, 7],
        "resblock_dilation_sizes": [[1, 3], [1, 5]],
        "learning_rate": 0.0002,
    }
    assert generator_arguments(config) == ARGUMENTS
    with pytest.raises(InputError, match="resblock='2': expected 1, the larger blocks"):
        generator_arguments(config | {"resblock": "2"})
    with pytest.raises(InputError, match="lacks num_mels"):
        generator_arguments({k: v for k, v in config.items() if k != "num_mels"})


def test_a_vocoder_that_normalises_its_input_is_refused():
    with pytest.raises(InputError, match="normalize_before=True: expected False"):
        speecht5_arguments({})
    with pytest.raises(InputError, match=r"leaky_relu_slope=0\.2"):
        speecht5_arguments({"normalize_before": False, "leaky_relu_slope": 0.2})


def test_a_high_resolution_vocoder_is_not_exported_to_another_padding():
    with pytest.raises(InputError, match="high_resolution"):
        speecht5_config(RELEASED[1], sample_rate=48000)


def test_a_tensor_that_is_missing_or_strange_is_named():
    state = dict(HiFiGAN(**ARGUMENTS).state_dict())
    shapes = {name: tensor.shape for name, tensor in state.items()}
    extra = state | {"conv_extra.weight": torch.zeros(1)}
    with pytest.raises(InputError, match=r"g\.ckpt: no rule takes conv_extra\.weight"):
        apply_rules(generator_rules(), extra, shapes, origin="g.ckpt")
    del state["ups.1.bias"]
    with pytest.raises(InputError, match=r"g\.ckpt: nothing fills ups\.1\.bias"):
        apply_rules(generator_rules(), state, shapes, origin="g.ckpt")
