"""Latent mixup in the training step: what the network learns from, and what CLAP hears of it."""

import pytest
import torch
import toys
from torch.nn import functional as F

from ldm_audio.errors import InputError
from ldm_audio.randomness import RowRandom


def objective(**changes):
    mixup = toys.mixup(**{"space": "latent"} | changes.pop("mixup", {}))
    made = toys.objective("latent_diffusion", mixup=mixup, condition_dropout=0.0, **changes).train()
    made.latent_scale.fill_(0.7)
    return made


def pairs(*ratios: float) -> dict:
    """A batch whose rows are to be mixed with others at these lambdas."""
    count = len(ratios)
    batch = toys.batch(*range(count))
    other = toys.batch(*range(10, 10 + count))
    return batch | {
        "partner": other["waveform"], "partner_caption": other["caption"], "mix_ratio": torch.tensor(ratios),
    }  # fmt: skip


def rows(batch: dict) -> RowRandom:
    return RowRandom([(0, 0, int(item)) for item in batch["item"]])


@torch.no_grad()
def test_the_network_learns_from_mixed_latents_where_there_is_a_partner():
    made = objective()
    batch = pairs(0.3, 1.0, 0.8)
    mean, std = made.posterior(batch)
    anchor, partner = (made.vae.encode(made.mel(batch[name])) for name in ("waveform", "partner"))
    share = batch["mix_ratio"][:, None, None, None]
    assert (mean - (share * anchor.mean + (1 - share) * partner.mean)).abs().max() < 1e-5
    assert torch.allclose(std[1], anchor.std[1], atol=1e-5) and torch.allclose(
        mean[1], anchor.mean[1], atol=1e-5
    )
    expected = torch.hypot(share * anchor.std, (1 - share) * partner.std)
    assert (std - expected).abs().max() < 1e-5


@torch.no_grad()
def test_clap_hears_the_decoded_mix_and_the_unmixed_clips_themselves():
    made = objective()
    batch = pairs(0.3, 1.0)
    z0 = made.latent_scale * made.posterior(batch)[0]
    embed = made.condition(batch, rows(batch), z0)
    sound = made.vocoder(made.vae.decode(z0[:1] / made.latent_scale))[:, 0, : toys.SAMPLES]
    assert (embed[0] - made.clap.embed_audio(sound)[0]).abs().max() < 1e-5
    assert (embed[1] - made.clap.embed_audio(batch["waveform"][1:])[0]).abs().max() < 1e-5
    assert (embed[0] - made.clap.embed_audio(batch["waveform"][:1])[0]).abs().max() > 1e-3


@torch.no_grad()
def test_what_clap_hears_ends_in_silence_only_where_the_original_is_followed():
    sounds = {}
    for tail in ("trim", "silent"):
        made = objective(mixup={"condition_tail": tail})
        sounds[tail] = made.heard(made.posterior(pairs(0.5))[0], toys.SAMPLES)
    kept = int(0.9 * toys.SAMPLES)
    assert sounds["trim"].shape == sounds["silent"].shape == (1, toys.SAMPLES)
    assert torch.equal(sounds["trim"][:, :kept], sounds["silent"][:, :kept])
    assert sounds["trim"][:, kept:].any() and not sounds["silent"][:, kept:].any()


@torch.no_grad()
def test_cached_pairs_train_as_the_clips_do():
    made = objective()
    toys.randomise(made.unet)
    batch = pairs(0.3, 1.0)
    anchor, partner = (made.vae.encode(made.mel(batch[name])) for name in ("waveform", "partner"))
    cached = {name: batch[name] for name in ("caption", "partner_caption", "mix_ratio", "item")}
    cached |= {
        "z_mean": anchor.mean,
        "z_std": anchor.std,
        "audio_embed": made.clap.embed_audio(batch["waveform"]),
    }
    cached |= {"partner_z_mean": partner.mean, "partner_z_std": partner.std}
    for step in range(2):
        expected = made.diffusion_loss(batch, step).item()
        assert made.diffusion_loss(cached, step).item() == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_captions_are_mixed_as_embeddings_only_where_asked_for():
    batch = pairs(0.3, 1.0)
    for text in ("anchor", "interpolate"):
        made = objective(text_probability=1.0, mixup={"text": text})
        own, other = (made.embed_captions(batch[name]) for name in ("caption", "partner_caption"))
        mixed = F.normalize(0.3 * own[0] + 0.7 * other[0], dim=0) if text == "interpolate" else own[0]
        embed = made.condition(batch, rows(batch), torch.zeros(0))
        assert (embed[0] - mixed).abs().max() < 1e-5 and (embed[1] - own[1]).abs().max() < 1e-5


def test_a_mixed_row_does_not_depend_on_its_neighbours():
    made = objective()
    toys.randomise(made.unet)
    with torch.no_grad():
        together = made.diffusion_loss(pairs(0.3, 0.6), 1).item()
        second = {name: value[1:] for name, value in pairs(0.3, 0.6).items()}
        alone = made.diffusion_loss(pairs(0.3), 1).item() + made.diffusion_loss(second, 1).item()
    assert together == pytest.approx(alone / 2, rel=1e-5)


def test_latent_mixup_without_a_vocoder_is_refused_where_clap_must_hear():
    with pytest.raises(InputError, match=r"mixup\.space=latent: CLAP hears .* vocoder is null"):
        objective(vocoder=None)
    objective(vocoder=None, text_probability=1.0)
