"""The pipeline on tiny real networks with random weights."""

from functools import partial

import pytest
import torch
from torch import nn

from ldm_audio.audio.clap_mel import ClapMel
from ldm_audio.audio.mel import LogMel
from ldm_audio.data.tokenizers import train_bpe
from ldm_audio.diffusion.samplers import ddim, ddpm, dpm_solver, pndm
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError
from ldm_audio.models.clap import CLAP
from ldm_audio.models.hifigan import HiFiGAN
from ldm_audio.models.htsat import HTSAT
from ldm_audio.models.roberta import Roberta
from ldm_audio.models.unet import UNet
from ldm_audio.models.vae import VAE
from ldm_audio.pipelines.decoding import decode_latents
from ldm_audio.pipelines.text_to_audio import Generated, TextToAudio, best_first
from ldm_audio.randomness import RowRandom

torch.set_num_threads(1)

PROMPTS = ["a dog barks", "a piano plays a slow and sad melody in a large hall", "rain"]
JOINT_DIM = 12
SETTINGS = {
    "duration": 0.27,
    "num_steps": 4,
    "guidance_scale": 2.5,
    "sampler": partial(ddim, eta=1.0),
    "spacing": "leading",
    "seed": 3,
    "batch_size": 4,
}


def make_clap(tokenizer, audio=True):
    front_end = ClapMel(
        sample_rate=24000,
        n_fft=512,
        hop_length=240,
        n_mels=16,
        fmin=50,
        fmax=12000,
        max_samples=4800,
        fusion=False,
        filling="repeatpad",
    )
    audio_tower = HTSAT(
        n_mels=16,
        spec_size=64,
        patch_size=4,
        patch_stride=4,
        dim=8,
        depths=[1, 1],
        num_heads=[2, 2],
        window_size=4,
        mlp_ratio=2.0,
        qkv_bias=True,
        dropout=0.0,
        drop_path=0.0,
        fusion=None,
        spec_augment=False,
    )
    text_tower = Roberta(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        depth=1,
        num_heads=2,
        ff_dim=16,
        max_positions=80,
        pad_token=tokenizer.pad_token,
        layer_norm_eps=1e-5,
        dropout=0.1,
    )
    audio_tower = audio_tower if audio else None
    return CLAP(front_end=front_end, audio_tower=audio_tower, text_tower=text_tower, joint_dim=JOINT_DIM)


def randomise(network):
    """Every parameter at random, the zero-initialised ones too, at sizes that let each input through."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = 1.2 * noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.2 * noise + float("norm" in name and name.endswith("weight"))
    return network


def make_pipeline(*, audio=True, prediction="eps", bands=1):
    tokenizer = train_bpe(PROMPTS, vocab_size=300, max_length=77)
    unet = UNet(
        in_channels=4,
        out_channels=4,
        channels=8,
        channel_mults=[1, 2],
        num_res_blocks=1,
        attention_levels=[False, True],
        num_heads=[1, 2],
        transformer_depth=1,
        transformers_per_block=1,
        embed_dim=JOINT_DIM,
        embed_mode="concat",
        context_dim=None,
        norm_groups=4,
        dropout=0.1,
    )
    vae = VAE(
        in_channels=bands,
        channels=8,
        channel_mults=[1, 1, 1],
        num_res_blocks=1,
        latent_channels=4,
        norm_groups=4,
        dropout=0.0,
    )
    vocoder = HiFiGAN(
        n_mels=16,
        channels=8,
        upsample_rates=[10, 8, 2],
        upsample_kernels=[16, 16, 8],
        resblock_kernels=[3],
        resblock_dilations=[[1, 3]],
        high_resolution=False,
    )
    parts = [randomise(part) for part in (unet, vae, vocoder, make_clap(tokenizer, audio))]
    return TextToAudio(
        **dict(zip(("unet", "vae", "vocoder", "clap"), parts)),
        tokenizer=tokenizer,
        schedule=Schedule(
            num_timesteps=1000,
            beta_start=0.0015,
            beta_end=0.0195,
            kind="scaled_linear",
            prediction=prediction,
        ),
        mel=LogMel(
            sample_rate=16000,
            n_fft=512,
            hop_length=160,
            win_length=512,
            n_mels=16,
            fmin=0,
            fmax=8000,
            framing="hifigan",
        ),
        latent_scale=0.9,
    )


@pytest.fixture(scope="module")
def pipeline():
    return make_pipeline()


def test_a_sound_for_each_prompt_exactly_as_long_as_asked(pipeline):
    for duration, samples, frames in (
        (0.27, 4320, 28),
        (0.01, 160, 4),
        (0.0801, 1282, 12),
        (1.0, 16000, 100),
    ):
        sounds = pipeline(PROMPTS, **SETTINGS | {"duration": duration})
        assert sounds.waveforms.shape == (3, samples) and sounds.mels.shape == (3, 16, frames)
        assert sounds.waveforms.dtype == torch.float32 and sounds.waveforms.abs().max() <= 1
        assert sounds.prompts == PROMPTS and sounds.seeds == [(3, 0)] * 3 and sounds.scores is None


def test_the_same_prompt_and_seed_sound_the_same_in_any_batch_and_order(pipeline):
    together = pipeline(PROMPTS, **SETTINGS)
    worst = 0.0
    for batch_size in (1, 2, 3):
        others = pipeline(PROMPTS[::-1] + PROMPTS, **SETTINGS | {"batch_size": batch_size})
        expected = torch.cat([together.waveforms.flip(0), together.waveforms])
        worst = max(worst, (others.waveforms - expected).abs().max().item())
    for row, prompt in enumerate(PROMPTS):
        alone = pipeline([prompt], **SETTINGS)
        worst = max(worst, (alone.waveforms[0] - together.waveforms[row]).abs().max().item())
    assert worst < 1e-5
    one, two, three = together.waveforms
    assert min((one - two).std(), (two - three).std()) > 1e-3  # there is something to confuse


def test_a_candidate_is_the_same_sound_however_many_there_are(pipeline):
    few = pipeline(PROMPTS[:1], **SETTINGS, num_waveforms_per_prompt=2)
    many = pipeline(PROMPTS[1::-1], **SETTINGS, num_waveforms_per_prompt=5)
    by_seed = {key: many.waveforms[5 + row] for row, key in enumerate(many.seeds[5:])}
    for waveform, key in zip(few.waveforms, few.seeds):
        assert (waveform - by_seed[key]).abs().max() < 1e-5


def test_each_prompt_may_have_its_own_seed(pipeline):
    both = pipeline(PROMPTS[:2], **SETTINGS | {"seed": [3, 8]})
    assert both.seeds == [(3, 0), (8, 0)]
    for row, seed in enumerate((3, 8)):
        alone = pipeline(PROMPTS[row : row + 1], **SETTINGS | {"seed": seed})
        assert (alone.waveforms[0] - both.waveforms[row]).abs().max() < 1e-5


def test_latents_given_take_the_place_of_the_seeds_noise(pipeline):
    settings = SETTINGS | {"sampler": partial(ddim, eta=0.0)}
    shape = pipeline.latent_shape(pipeline.num_samples(SETTINGS["duration"]))
    noise = RowRandom([(3, 0)]).randn(*shape)
    ours = pipeline(PROMPTS[:1], **settings).waveforms
    given = pipeline(PROMPTS[:1], **settings | {"seed": 99}, latents=noise).waveforms
    assert torch.equal(ours, given)
    with pytest.raises(InputError, match=r"latents \(1, 4, 5, 4\): expected \(1, 4, 7, 4\)"):
        pipeline(PROMPTS[:1], **settings, latents=noise[:, :, :5])


@pytest.mark.parametrize("duration", [0.5, 1.03, 2.0])
def test_a_sound_longer_than_the_window_is_exactly_as_long_as_asked_and_still_one_sound(pipeline, duration):
    long = SETTINGS | {"duration": duration, "window": 0.32, "overlap": 0.12}
    sounds = pipeline(PROMPTS[:2], **long)
    assert sounds.waveforms.shape == (2, round(16000 * duration)) and sounds.waveforms.isfinite().all()
    alone = pipeline(PROMPTS[1:2], **long | {"batch_size": 1})
    assert (alone.waveforms[0] - sounds.waveforms[1]).abs().max() < 1e-5
    whole = pipeline(PROMPTS[:2], **SETTINGS | {"duration": duration})
    assert (whole.waveforms - sounds.waveforms).abs().max() > 1e-4


def test_windows_are_denoised_one_at_a_time(pipeline, monkeypatch):
    seen = []
    forward = pipeline.unet.forward
    monkeypatch.setattr(
        pipeline.unet, "forward", lambda zt, *rest: seen.append(zt.shape) or forward(zt, *rest)
    )
    pipeline(PROMPTS[:2], **SETTINGS | {"duration": 1.0, "window": 0.32, "overlap": 0.12})
    assert {shape[0] for shape in seen} == {4} and {shape[2] for shape in seen} == {8}


def test_the_sound_of_a_prompt_conditions_like_its_text(pipeline):
    waveform = pipeline(PROMPTS[:1], **SETTINGS).waveforms
    embed = pipeline.embed_audio(waveform, 16000)
    assert embed.shape == (1, JOINT_DIM) and abs(embed.norm().item() - 1) < 1e-5
    heard = pipeline(prompt_embeds=embed, **SETTINGS)
    assert torch.allclose(heard.embeds, embed.float(), atol=1e-6)
    assert (heard.waveforms - waveform).abs().max() > 1e-4


def test_a_long_sound_is_heard_piece_by_piece(pipeline):
    piece = pipeline.clap.front_end.max_samples * 16000 // 24000
    waveform = torch.randn(2, 3 * piece, generator=torch.Generator().manual_seed(0)) / 5
    pieces = [pipeline.embed_audio(part, 16000) for part in waveform.split(piece, dim=1)]
    mean = torch.nn.functional.normalize(sum(pieces), dim=-1)
    # The resampler does not see beyond a piece's ends: near, not equal.
    assert torch.nn.functional.cosine_similarity(pipeline.embed_audio(waveform, 16000), mean).min() > 0.999
    assert (pieces[0] - pieces[1]).abs().max() > 1e-3


def test_packing_changes_no_sound():
    pipeline = make_pipeline()
    plain = pipeline(PROMPTS, **SETTINGS)
    packed = pipeline.pack()(PROMPTS, **SETTINGS)
    assert (plain.waveforms - packed.waveforms).abs().max() < 1e-4  # random networks magnify the last bits
    assert (plain.mels - packed.mels).norm() / plain.mels.norm() < 1e-5


def test_bf16_networks_come_near_fp32_and_keep_one_sound_a_seed():
    pipeline = make_pipeline()
    settings = SETTINGS | {"sampler": partial(ddim, eta=0.0)}
    exact = pipeline(PROMPTS, **settings)
    rough = pipeline.set_precision("bf16").pack()(PROMPTS, **settings)
    assert rough.waveforms.dtype == torch.float32 and rough.waveforms.isfinite().all()
    assert 0 < (rough.mels - exact.mels).norm() / exact.mels.norm() < 0.1
    with pytest.raises(InputError, match="precision='fp16': expected fp32 or bf16"):
        pipeline.set_precision("fp16")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"guidance_scale": 5.0},
        {"num_steps": 5},
        {"spacing": "trailing"},
        {"sampler": dpm_solver},
    ],
)
def test_every_setting_is_heard(pipeline, change):
    one = pipeline(PROMPTS[:1], **SETTINGS).waveforms
    other = pipeline(PROMPTS[:1], **SETTINGS | change).waveforms
    assert (one - other).abs().max() > 1e-4


def test_prompts_and_negative_prompts_are_heard(pipeline):
    plain = pipeline(PROMPTS[:1], **SETTINGS).waveforms
    assert (plain - pipeline(PROMPTS[2:], **SETTINGS).waveforms).abs().max() > 1e-4
    negative = pipeline(PROMPTS[:1], **SETTINGS, negative_prompts=["noise"]).waveforms
    assert (plain - negative).abs().max() > 1e-4


def test_the_unconditional_embedding_is_that_of_the_empty_text(pipeline):
    plain = pipeline(PROMPTS, **SETTINGS).waveforms
    spelled = pipeline(PROMPTS, **SETTINGS, negative_prompts=["", "", ""]).waveforms
    assert (plain - spelled).abs().max() < 1e-5


def test_without_guidance_negative_prompts_do_not_matter(pipeline):
    settings = SETTINGS | {"guidance_scale": 1.0}
    plain = pipeline(PROMPTS[:1], **settings).waveforms
    assert torch.equal(plain, pipeline(PROMPTS[:1], **settings, negative_prompts=["noise"]).waveforms)


def test_embeddings_of_the_prompts_give_the_sounds_of_the_prompts(pipeline):
    embeds = pipeline.embed(PROMPTS, batch_size=3)
    by_text, by_embed = pipeline(PROMPTS, **SETTINGS), pipeline(prompt_embeds=embeds, **SETTINGS)
    assert (by_text.waveforms - by_embed.waveforms).abs().max() < 1e-5
    assert by_embed.prompts == ["", "", ""]


def test_with_all_embeddings_given_the_text_tower_is_not_needed():
    pipeline, negatives = make_pipeline(), ["noise", "", "hiss"]
    by_text = pipeline(PROMPTS, **SETTINGS, negative_prompts=negatives)
    embeds, negative = (pipeline.embed(texts, batch_size=3) for texts in (PROMPTS, negatives))
    given = {"prompt_embeds": embeds, "negative_embeds": negative, "num_waveforms_per_prompt": 1}
    by_embed = pipeline.forget_text()(**SETTINGS, **given)
    assert (by_text.waveforms - by_embed.waveforms).abs().max() < 1e-5
    assert pipeline(**SETTINGS, **given | {"num_waveforms_per_prompt": 2}).scores.isfinite().all()
    with pytest.raises(InputError, match="no text tower"):
        pipeline(PROMPTS, **SETTINGS)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
@pytest.mark.parametrize(
    "sampler",
    [partial(ddim, eta=0.0), partial(ddpm, variance="small"), partial(pndm, runge_kutta=True), dpm_solver],
    ids=["ddim", "ddpm", "pndm", "dpm_solver"],
)
def test_every_sampler_and_prediction_make_finite_sound(sampler, prediction):
    sounds = make_pipeline(prediction=prediction)(PROMPTS[:1], **SETTINGS | {"sampler": sampler})
    assert sounds.waveforms.isfinite().all()


def test_guidance_may_be_rescaled_and_limited(pipeline):
    plain = pipeline(PROMPTS[:1], **SETTINGS).waveforms
    assert (plain - pipeline(PROMPTS[:1], **SETTINGS, guidance_rescale=0.7).waveforms).abs().max() > 1e-4
    never = pipeline(PROMPTS[:1], **SETTINGS, guidance_interval=(1000, 1001)).waveforms
    assert torch.equal(never, pipeline(PROMPTS[:1], **SETTINGS | {"guidance_scale": 1.0}).waveforms)


def test_candidates_are_ranked_within_their_prompt_by_clap(pipeline):
    sounds = pipeline(PROMPTS, **SETTINGS, num_waveforms_per_prompt=3)
    assert sounds.prompts == [prompt for prompt in PROMPTS for _ in range(3)]
    scores = sounds.scores.reshape(3, 3)
    assert (scores.diff(dim=1) <= 0).all() and scores.abs().max() <= 1 + 1e-6
    assert all(sorted(sounds.seeds[p : p + 3]) == [(3, 0), (3, 1), (3, 2)] for p in (0, 3, 6))
    embeds = pipeline.embed(PROMPTS, batch_size=3).repeat_interleave(3, 0)
    with torch.no_grad():
        again = pipeline.similarity(sounds.waveforms, embeds)
    assert (again - sounds.scores).abs().max() < 1e-5


def test_best_first_keeps_each_prompts_rows_together():
    rows = torch.arange(6.0)
    generated = Generated(
        waveforms=rows[:, None],
        mels=rows[:, None, None],
        scores=torch.tensor([0.1, 0.9, 0.5, 0.8, 0.2, 0.8]),
        prompts=["a"] * 3 + ["b"] * 3,
        seeds=[(0, i % 3) for i in range(6)],
        embeds=torch.zeros(6, 2),
    )
    ranked = best_first(generated, 3)
    assert ranked.waveforms[:, 0].tolist() == [1, 2, 0, 3, 5, 4] == ranked.mels[:, 0, 0].tolist()
    assert ranked.seeds == [(0, 1), (0, 2), (0, 0), (0, 0), (0, 2), (0, 1)]
    assert ranked.prompts == generated.prompts


def test_progress_counts_every_step_of_every_chunk(pipeline):
    seen = []
    pipeline(PROMPTS, **SETTINGS | {"batch_size": 2}, progress=lambda *counts: seen.append(counts))
    assert seen == [(done, 8) for done in range(9)]


def test_sampling_leaves_the_global_generator_alone(pipeline):
    state = torch.get_rng_state()
    pipeline(PROMPTS[:1], **SETTINGS)
    assert torch.equal(state, torch.get_rng_state())


def test_sounds_may_be_trained_on(pipeline):
    weight = torch.ones(1, requires_grad=True)
    (weight * pipeline(PROMPTS[:1], **SETTINGS).waveforms).sum().backward()
    assert weight.grad is not None


def test_parts_are_in_eval_mode_and_move_together(pipeline):
    networks = [pipeline.unet, pipeline.vae, pipeline.vocoder, pipeline.clap]
    assert not any(network.training for network in networks)
    assert pipeline.to("cpu") is pipeline and pipeline.device == torch.device("cpu")


def test_a_mel_in_bands_gives_latents_of_a_bands_height():
    pipeline = make_pipeline(bands=2)
    assert pipeline.latent_shape(160 * 9) == (4, 3, 2)
    assert pipeline(PROMPTS[:1], **SETTINGS | {"duration": 0.09}).mels.shape == (1, 16, 12)


def test_decoding_cuts_the_waveform_and_undoes_the_scale(pipeline):
    z = torch.randn(2, 4, 3, 4, generator=torch.Generator().manual_seed(0))
    waveform, mel = decode_latents(pipeline.vae, pipeline.vocoder, 2.0 * z, 2.0, 1900)
    assert torch.equal(mel, pipeline.vae.decode(z))
    assert torch.equal(waveform, pipeline.vocoder(mel)[:, 0, :1900])
    with pytest.raises(InputError, match="num_samples=9999"):
        decode_latents(pipeline.vae, pipeline.vocoder, z, 2.0, 9999)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": None}, "either prompts or prompt_embeds"),
        ({"prompt_embeds": torch.ones(1, JOINT_DIM)}, "either prompts or prompt_embeds"),
        ({"prompts": "a dog"}, "prompts='a dog': expected a list"),
        ({"prompts": ["a dog", 7]}, r"prompts\[1\]=7: expected a string"),
        ({"negative_prompts": ["x"]}, "1 negative_prompts for 3 prompts"),
        ({"negative_prompts": ["x", None, "y"]}, r"negative_prompts\[1\]=None"),
        ({"prompts": None, "prompt_embeds": torch.ones(2, 5)}, r"prompt_embeds \(2, 5\): expected"),
        ({"prompts": None, "prompt_embeds": torch.ones(0, JOINT_DIM)}, "empty"),
        ({"negative_embeds": torch.ones(3, 5)}, r"negative_embeds \(3, 5\): expected"),
        ({"negative_embeds": torch.ones(2, JOINT_DIM)}, "2 negative_embeds for 3 prompts"),
        ({"negative_embeds": torch.ones(3, JOINT_DIM), "negative_prompts": ["x"] * 3}, "not both"),
        ({"duration": 0}, "duration=0"),
        ({"duration": -1.0}, r"duration=-1\.0"),
        ({"duration": 1e-6}, "duration=1e-06"),
        ({"duration": float("nan")}, "duration=nan"),
        ({"num_steps": 0}, "num_steps=0"),
        ({"num_steps": 1001}, "num_steps=1001"),
        ({"spacing": "even"}, "spacing='even'"),
        ({"seed": [1, 2]}, "2 seeds for 3 prompts"),
        ({"window": 0.1, "overlap": 0.1}, "overlap of 2 latent frames"),
        ({"duration": None}, "duration=None"),
        ({"guidance_scale": -0.5}, r"guidance_scale=-0\.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"num_waveforms_per_prompt": 0}, "num_waveforms_per_prompt=0"),
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(pipeline, change, message):
    with pytest.raises(InputError, match=message):
        pipeline(**{"prompts": PROMPTS} | SETTINGS | change)


def test_candidates_need_an_audio_tower_but_one_sound_does_not():
    pipeline = make_pipeline(audio=False)
    assert pipeline(PROMPTS[:1], **SETTINGS).waveforms.isfinite().all()
    with pytest.raises(InputError, match=r"num_waveforms_per_prompt=2.*no audio tower"):
        pipeline(PROMPTS[:1], **SETTINGS, num_waveforms_per_prompt=2)


def test_a_vocoder_of_another_hop_is_refused(pipeline):
    vocoder = nn.Identity()
    vocoder.hop_length = 256
    with pytest.raises(InputError, match="the vocoder's hop is 256 samples, the mel's 160"):
        TextToAudio(**vars(pipeline) | {"vocoder": vocoder})
