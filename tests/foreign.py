"""Published layouts at toy size: original checkpoints, and folders that diffusers itself writes."""

import gzip
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ldm_audio.convert import audioldm, clap, hifigan, laion
from ldm_audio.convert.rules import invert_rules
from ldm_audio.data.tokenizers import Tokenizer, train_bpe
from ldm_audio.pretrained import build

CAPTIONS = ["a dog barks", "a piano plays a slow and sad melody in a large hall", "hiss", "a voice speaks"]
LATENT_SCALE = 0.875

# Originals have 32 groups in every norm, so that nothing is narrower than 32 channels.
UNET = {
    "_target_": "ldm_audio.models.unet.UNet", "in_channels": 4, "out_channels": 4, "channels": 32,
    "channel_mults": [1, 2], "num_res_blocks": 1, "attention_levels": [False, True], "num_heads": [1, 2],
    "transformer_depth": 1, "transformers_per_block": 1, "embed_dim": 24, "embed_mode": "concat",
    "context_dim": None, "norm_groups": 32, "dropout": 0.0,
}  # fmt: skip
VAE = {
    "_target_": "ldm_audio.models.vae.VAE", "in_channels": 1, "channels": 32, "channel_mults": [1, 2],
    "num_res_blocks": 1, "latent_channels": 4, "norm_groups": 32, "dropout": 0.0,
}  # fmt: skip
VOCODER = {
    "_target_": "ldm_audio.models.hifigan.HiFiGAN", "n_mels": 16, "channels": 16,
    "upsample_rates": [10, 8, 2], "upsample_kernels": [16, 16, 8], "resblock_kernels": [3],
    "resblock_dilations": [[1, 3]], "high_resolution": False,
}  # fmt: skip
VOCODER_JSON = {
    "num_mels": 16, "upsample_initial_channel": 16, "upsample_rates": [10, 8, 2],
    "upsample_kernel_sizes": [16, 16, 8], "resblock_kernel_sizes": [3],
    "resblock_dilation_sizes": [[1, 3]], "resblock": "1",
}  # fmt: skip
CLAP = clap.recipe(
    {
        "n_mels": 64, "spec_size": 256, "patch_size": 4, "patch_stride": 4, "dim": 16, "depths": [1, 2],
        "num_heads": [2, 4], "window_size": 8, "mlp_ratio": 2.0, "qkv_bias": True, "fusion": None,
    },
    {
        "vocab_size": 300, "dim": 64, "depth": 2, "num_heads": 1, "ff_dim": 48, "max_positions": 80,
        "pad_token": 1, "layer_norm_eps": 1e-5, "dropout": 0.1,
    },
    {**laion.FRONT_END, "n_mels": 64, "fusion": False},
    joint_dim=24,
)  # fmt: skip
RECIPES = {"unet": UNET, "vae": VAE, "vocoder": VOCODER, "clap": CLAP}


def key_list(name: str) -> dict[str, Tensor]:
    """Every tensor of a released checkpoint, on the meta device; int64 where the originals have it."""
    state = {}
    with gzip.open(Path(__file__).parent / "fixtures" / "keys" / f"{name}.txt.gz", "rt") as lines:
        for key, shape in (line.split() for line in lines if not line.startswith("#")):
            numbers = [int(number) for number in shape.strip("[]").split(",") if number]
            whole = key.endswith(("position_ids", "position_index", "num_batches_tracked", "num_updates"))
            dtype = torch.int64 if whole else torch.float32
            state[key] = torch.empty(numbers, dtype=dtype, device="meta")
    return state


def below(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def random_like(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Random numbers for the tensor `name`, at sizes that let each input through."""
    noise = torch.randn(shape, generator=generator)
    if noise.ndim > 1:
        return 1.2 * noise / noise[0].numel() ** 0.5
    if name.endswith("running_var"):
        return 0.5 + noise.abs()
    return 0.2 * noise + float(name.endswith("weight"))  # one number a channel: a norm's


def randomise(network: nn.Module, *, seed: int = 0) -> nn.Module:
    """Every parameter and running statistic at random."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in network.state_dict().items():
        if name.endswith("num_batches_tracked"):
            tensor.fill_(3)
        if tensor.is_floating_point():
            tensor.copy_(random_like(name, tensor.shape, generator))
    return network.eval()


def network(recipe: dict, *, seed: int = 0) -> nn.Module:
    return randomise(build(recipe, source="a toy").to_empty(device="cpu"), seed=seed)


def networks() -> dict[str, nn.Module]:
    return {name: network(recipe, seed=seed) for seed, (name, recipe) in enumerate(RECIPES.items())}


def tokenizer() -> Tokenizer:
    return train_bpe(CAPTIONS, vocab_size=300, max_length=60)


def save_tokenizer(folder: Path) -> Path:
    tokenizer().save(folder / "tokenizer.json")
    return folder


def with_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def unet_state(unet: nn.Module) -> dict[str, Tensor]:
    keys = ("num_res_blocks", "attention_levels", "transformers_per_block")
    return invert_rules(audioldm.unet_rules(**{key: UNET[key] for key in keys}), unet.state_dict())


def vae_state(vae: nn.Module) -> dict[str, Tensor]:
    return invert_rules(audioldm.vae_rules(num_levels=2), vae.state_dict())


def laion_state(network: nn.Module) -> dict[str, Tensor]:
    """LAION's names, with what they have besides."""
    state = invert_rules(laion.clap_rules(), network.state_dict())
    return state | {
        "audio_branch.spectrogram_extractor.stft.conv_real.weight": torch.zeros(3),
        "audio_branch.logmel_extractor.melW": torch.zeros(3),
        "audio_branch.layers.1.blocks.1.attn_mask": torch.zeros(3),
        "audio_branch.tscam_conv.weight": torch.zeros(3),
        "audio_branch.head.bias": torch.zeros(3),
        "text_branch.embeddings.position_ids": torch.arange(80)[None],
        "audio_transform.sequential.0.weight": torch.zeros(3),
    }


def checkpoint_state(parts: dict[str, nn.Module]) -> dict[str, Tensor]:
    """A whole checkpoint whose averaged UNet is `parts["unet"]` and whose raw one is that plus 1."""
    unet = unet_state(parts["unet"])
    return {
        "betas": torch.zeros(1000),
        "logvar": torch.zeros(1000),
        "scale_factor": torch.tensor(LATENT_SCALE),
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(7, dtype=torch.int32),
        **{audioldm.UNET_PREFIX + name: tensor + 1 for name, tensor in unet.items()},
        **{audioldm.ema_key(name): tensor for name, tensor in unet.items()},
        **with_prefix(vae_state(parts["vae"]), audioldm.VAE_PREFIX),
        **with_prefix(parts["vocoder"].state_dict(), f"{audioldm.VAE_PREFIX}vocoder."),
        **with_prefix(laion_state(parts["clap"]), "cond_stage_model.model."),
    }


def allow_toy_vocoder(monkeypatch) -> None:
    """Whole checkpoints hold no vocoder config: only released layouts are known, and here the toy one."""
    arguments = {key: value for key, value in VOCODER.items() if key != "_target_"}
    monkeypatch.setattr(hifigan, "RELEASED", (*hifigan.RELEASED, arguments))


def clap_features(waveform: np.ndarray, monkeypatch, *, fusion: bool, filling: str = "repeatpad") -> Tensor:
    """transformers' features of one clip, its random choices being our deterministic ones."""
    from transformers import ClapFeatureExtractor

    picks = iter([lambda third: third[0], lambda third: third[len(third) // 2], lambda third: third[-1]])
    monkeypatch.setattr(np.random, "choice", lambda third: next(picks)(third))
    monkeypatch.setattr(np.random, "randint", lambda low, high: low)
    extractor = ClapFeatureExtractor(frequency_min=50, truncation="fusion" if fusion else "rand_trunc")
    features = extractor(waveform, sampling_rate=48000, padding=filling, return_tensors="pt")
    return features["input_features"]


def their_clap(*, text_only: bool) -> nn.Module:
    import transformers

    text = {
        "vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 80, "projection_dim": 24,
    }  # fmt: skip
    audio = {
        "patch_embeds_hidden_size": 16, "hidden_size": 32, "depths": [1, 2], "num_attention_heads": [2, 4],
    }  # fmt: skip
    if text_only:
        network = transformers.ClapTextModelWithProjection(transformers.ClapTextConfig(**text))
    else:
        config = transformers.ClapConfig(text_config=text, audio_config=audio, projection_dim=24)
        network = transformers.ClapModel(config)
    return randomise(network)


def their_pipeline(name: str):
    """A random `AudioLDMPipeline` or `MusicLDMPipeline` of diffusers."""
    import diffusers
    import transformers

    unet = diffusers.UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
        norm_num_groups=4, cross_attention_dim=(8, 16), attention_head_dim=4,
        class_embed_type="simple_projection", class_embeddings_concat=True,
        projection_class_embeddings_input_dim=24,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2, block_out_channels=(8, 16), layers_per_block=1,
        latent_channels=4, norm_num_groups=4, scaling_factor=LATENT_SCALE,
    )  # fmt: skip
    vocoder = transformers.SpeechT5HifiGan(
        transformers.SpeechT5HifiGanConfig(
            model_in_dim=16, sampling_rate=16000, upsample_initial_channel=16, upsample_rates=[10, 8, 2],
            upsample_kernel_sizes=[16, 16, 8], resblock_kernel_sizes=[3], resblock_dilation_sizes=[[1, 3]],
            normalize_before=False,
        )
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.0015, beta_end=0.0195, beta_schedule="scaled_linear", steps_offset=1,
        set_alpha_to_one=False, clip_sample=False,
    )  # fmt: skip
    words = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer().backend, pad_token="<pad>", model_max_length=60
    )
    parts = {"vae": vae, "unet": unet, "vocoder": vocoder}
    parts = {key: randomise(network, seed=i) for i, (key, network) in enumerate(parts.items())}
    parts |= {"tokenizer": words, "scheduler": scheduler}
    parts["text_encoder"] = their_clap(text_only=name == "AudioLDMPipeline")
    if name == "MusicLDMPipeline":
        parts["feature_extractor"] = transformers.ClapFeatureExtractor(
            frequency_min=50, truncation="rand_trunc"
        )
    pipeline = getattr(diffusers, name)(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
