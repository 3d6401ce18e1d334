"""The whole pipeline against diffusers' AudioLDMPipeline, on tiny random networks with the same weights.

In float64, because random networks magnify what two orders of the same float32 operations differ by.
"""

import re
from functools import partial

import diffusers
import pytest
import torch
import transformers

from ldm_audio.audio.clap_mel import ClapMel
from ldm_audio.audio.mel import LogMel
from ldm_audio.convert import clap as clap_layout
from ldm_audio.convert import diffusers as layout
from ldm_audio.convert import hifigan as hifigan_layout
from ldm_audio.convert.rules import apply_rules, invert_rules, shapes_of
from ldm_audio.data.tokenizers import train_bpe
from ldm_audio.diffusion.samplers import ddim, pndm
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.models.clap import CLAP
from ldm_audio.models.hifigan import HiFiGAN
from ldm_audio.models.roberta import Roberta
from ldm_audio.models.unet import UNet
from ldm_audio.models.vae import VAE
from ldm_audio.pipelines.text_to_audio import TextToAudio
from ldm_audio.randomness import RowRandom

torch.set_num_threads(1)

PROMPTS = ["a dog barks", "a piano plays a slow and sad melody in a large hall"]
NEGATIVE = ["hiss", "a voice speaks"]
BETAS = {"beta_start": 0.0015, "beta_end": 0.0195}
UNET = {
    "in_channels": 4,
    "out_channels": 4,
    "channels": 8,
    "channel_mults": [1, 2],
    "num_res_blocks": 2,
    "attention_levels": [False, True],
    "num_heads": [2, 2],
    "transformer_depth": 1,
    "transformers_per_block": 1,
    "embed_dim": 32,
    "embed_mode": "concat",
    "context_dim": None,
    "norm_groups": 4,
    "dropout": 0.0,
}
VAE_TOY = {
    "in_channels": 1,
    "channels": 8,
    "channel_mults": [1, 2, 2],
    "num_res_blocks": 1,
    "latent_channels": 4,
    "norm_groups": 4,
    "dropout": 0.0,
}
VOCODER = {
    "n_mels": 16,
    "channels": 32,
    "upsample_rates": [5, 4, 2, 2, 2],
    "upsample_kernels": [16, 16, 8, 4, 4],
    "resblock_kernels": [3],
    "resblock_dilations": [[1, 3]],
    "high_resolution": False,
}


def randomise(network):
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = 1.2 * noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.2 * noise + float(bool(re.search("norm.*weight", name, re.IGNORECASE)))
    return network.eval().double()


def their_text_encoder(vocab_size):
    config = transformers.ClapTextConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=80,
        projection_dim=32,
        layer_norm_eps=1e-5,
    )
    return randomise(transformers.ClapTextModelWithProjection(config))


def our_clap(theirs):
    """A CLAP without audio tower, with the weights of a text encoder."""
    config = theirs.config
    text_tower = Roberta(
        vocab_size=config.vocab_size,
        dim=config.hidden_size,
        depth=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        ff_dim=config.intermediate_size,
        max_positions=config.max_position_embeddings,
        pad_token=config.pad_token_id,
        layer_norm_eps=config.layer_norm_eps,
        dropout=0.0,
    )
    front_end = ClapMel(
        sample_rate=48000,
        n_fft=1024,
        hop_length=480,
        n_mels=64,
        fmin=50,
        fmax=14000,
        max_samples=480000,
        fusion=False,
        filling="repeatpad",
    )
    clap = CLAP(front_end=front_end, audio_tower=None, text_tower=text_tower, joint_dim=config.projection_dim)
    rules = clap_layout.transformers_text_rules()
    clap.load_state_dict(apply_rules(rules, theirs.state_dict(), shapes_of(clap)))
    return clap.double()


def pipelines(sampler):
    tokenizer = train_bpe(PROMPTS + NEGATIVE, vocab_size=300, max_length=60)
    text_encoder = their_text_encoder(tokenizer.vocab_size)
    unet, vae, vocoder = (randomise(net) for net in (UNet(**UNET), VAE(**VAE_TOY), HiFiGAN(**VOCODER)))
    ours = TextToAudio(
        unet=unet,
        vae=vae,
        vocoder=vocoder,
        clap=our_clap(text_encoder),
        tokenizer=tokenizer,
        schedule=Schedule(num_timesteps=1000, kind="scaled_linear", prediction="eps", **BETAS),
        mel=LogMel(
            sample_rate=16000,
            n_fft=1024,
            hop_length=160,
            win_length=1024,
            n_mels=16,
            fmin=0,
            fmax=8000,
            framing="hifigan",
        ),
        latent_scale=0.9,
    )

    their_unet = diffusers.UNet2DConditionModel.from_config(layout.unet_config(UNET, sample_size=16))
    their_unet.load_state_dict(
        invert_rules(layout.unet_rules(), unet.state_dict(), shapes_of(their_unet)), strict=True
    )
    their_vae = diffusers.AutoencoderKL.from_config(layout.vae_config(VAE_TOY, latent_scale=0.9))
    their_vae.load_state_dict(
        invert_rules(layout.vae_rules(), vae.state_dict(), shapes_of(their_vae)), strict=True
    )
    config = transformers.SpeechT5HifiGanConfig(**hifigan_layout.speecht5_config(VOCODER, sample_rate=16000))
    their_vocoder = transformers.SpeechT5HifiGan(config).eval()
    rules = hifigan_layout.speecht5_rules(n_mels=16)
    their_vocoder.load_state_dict(invert_rules(rules, vocoder.state_dict(), shapes_of(their_vocoder)))
    settings = {"beta_schedule": "scaled_linear", "steps_offset": 1, "set_alpha_to_one": False} | BETAS
    if sampler == "ddim":
        scheduler = diffusers.DDIMScheduler(clip_sample=False, **settings)
    else:
        scheduler = diffusers.PNDMScheduler(skip_prk_steps=sampler == "plms", **settings)
    theirs = diffusers.AudioLDMPipeline(
        vae=their_vae.eval(),
        text_encoder=text_encoder,
        tokenizer=transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer.backend, pad_token="<pad>", model_max_length=60
        ),
        unet=their_unet.eval(),
        scheduler=scheduler,
        vocoder=their_vocoder,
    )
    theirs.set_progress_bar_config(disable=True)
    scheduler.alphas_cumprod = ours.schedule.alphas_cumprod
    scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return ours, theirs.to(torch.float64)


SAMPLERS = {
    "ddim": partial(ddim, eta=0.0),
    "plms": partial(pndm, runge_kutta=False),
    "runge_kutta": partial(pndm, runge_kutta=True),
}


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@pytest.mark.parametrize(
    "duration, guidance_scale, negative", [(0.28, 2.5, None), (0.28, 1.0, None), (0.22, 3.0, NEGATIVE)]
)
def test_waveforms_equal_diffusers(sampler, duration, guidance_scale, negative):
    ours, theirs = pipelines(sampler)
    sounds = ours(
        PROMPTS,
        negative_prompts=negative,
        duration=duration,
        num_steps=10,
        guidance_scale=guidance_scale,
        sampler=SAMPLERS[sampler],
        spacing="leading",
        seed=5,
        batch_size=2,
    )
    shape = ours.latent_shape(sounds.waveforms.shape[1])
    expected = theirs(
        PROMPTS,
        negative_prompt=negative,
        audio_length_in_s=duration,
        num_inference_steps=10,
        guidance_scale=guidance_scale,
        latents=RowRandom([(5, 0), (5, 0)]).randn(*shape).double(),
        output_type="pt",
    ).audios
    assert sounds.waveforms.shape == expected.shape and expected.std() > 1e-3
    assert (expected[0] - expected[1]).std() > 1e-3  # the prompts are heard
    assert (sounds.waveforms - expected).abs().max() < 1e-6
