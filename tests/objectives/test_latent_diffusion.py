"""Latent diffusion: its randomness, its scale, its condition, and its frozen parts."""

import math

import pytest
import torch
import toys
from torch import nn

from ldm_audio.data.latents import Latents
from ldm_audio.data.loader import ItemKey, collate
from ldm_audio.diffusion.schedule import Schedule
from ldm_audio.errors import InputError
from ldm_audio.objectives.latent_diffusion import LatentDiffusionObjective
from ldm_audio.pipelines.encode import Encoder, encode
from ldm_audio.randomness import RowRandom

NO_LATENTS = torch.zeros(0)  # only a mixed item's condition depends on its latents


def objective(**changes) -> LatentDiffusionObjective:
    made = toys.objective("latent_diffusion", **changes).train()
    toys.randomise(made.unet)
    return made


def rows(batch: dict, step: int = 0) -> RowRandom:
    return RowRandom([(0, step, int(item)) for item in batch["item"]])


@torch.no_grad()
def embeddings(made: LatentDiffusionObjective, batch: dict) -> tuple[torch.Tensor, ...]:
    """Of the captions, of "" and of the audio."""
    text = made.clap.embed_text(*made.tokenizer(batch["caption"]))
    empty = made.clap.embed_text(*made.tokenizer([""])).expand_as(text)
    return text, empty, made.clap.embed_audio(batch["waveform"])


def test_latent_scale_gives_sampled_latents_unit_variance():
    made = objective(vae=toys.randomise(toys.vae()))
    batches = [toys.batch(*range(8 * i, 8 * i + 8)) for i in range(4)]
    made.prepare(batches)
    sampled = []
    for batch in batches:
        mean, std = made.posterior(batch)
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(len(sampled)))
        sampled.append(made.latent_scale * (mean + std * noise))
    assert torch.cat(sampled).std().item() == pytest.approx(1.0, abs=0.02)
    assert made.latent_scale.item() != pytest.approx(1.0, abs=0.05)  # there was something to scale
    assert "latent_scale" in made.learned_state()


def test_latent_scale_counts_both_mean_and_spread():
    made = objective()
    mean, std = torch.tensor([1.0, 5.0]), torch.tensor([1.0, 3.0])
    made.prepare([{"z_mean": mean, "z_std": std}])
    assert made.latent_scale.item() == pytest.approx(
        (4.0 + 5.0) ** -0.5
    )  # variance of means, mean of variances


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_latents_without_variance_are_refused(value):
    made = objective()
    with pytest.raises(InputError, match=r"variance .*: is the vae trained\?"):
        made.prepare([{"z_mean": torch.full((2, 3), value), "z_std": torch.zeros(2, 3)}])


def test_the_condition_is_the_audios_the_texts_or_dropped():
    batch = toys.batch(0, 1, 2)
    for settings, expected in (
        ({"text_probability": 0.0, "condition_dropout": 0.0}, 2),
        ({"text_probability": 1.0, "condition_dropout": 0.0}, 0),
        ({"text_probability": 0.0, "condition_dropout": 1.0}, 1),
        ({"text_probability": 1.0, "condition_dropout": 1.0}, 1),
        ({"text_probability": 0.5, "condition_dropout": 1.0}, 1),
    ):
        made = objective(**settings)
        which = embeddings(made, batch)
        assert torch.allclose(made.condition(batch, rows(batch), NO_LATENTS), which[expected], atol=1e-6), (
            settings
        )
    assert min((which[i] - which[j]).abs().max() for i, j in ((0, 1), (0, 2), (1, 2))) > 1e-3


def test_a_mixed_condition_is_one_of_the_three_row_by_row_with_the_given_shares():
    made = objective(text_probability=0.5, condition_dropout=0.2)
    counts = torch.zeros(3)
    for start in range(0, 200, 50):
        batch = toys.batch(*range(start, start + 50))
        condition = made.condition(batch, rows(batch), NO_LATENTS)
        distance = torch.stack([(condition - embed).abs().amax(dim=1) for embed in embeddings(made, batch)])
        assert distance.amin(dim=0).max() < 1e-5
        counts += distance.argmin(dim=0).bincount(minlength=3)
    text, empty, audio = (counts / 200).tolist()
    assert (text, empty, audio) == pytest.approx((0.4, 0.2, 0.4), abs=0.1)


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_of_a_row_does_not_depend_on_its_neighbours(prediction):
    schedule = Schedule(**toys.SCHEDULE | {"prediction": prediction})
    made = objective(text_probability=0.5, condition_dropout=0.3, schedule=schedule)
    with torch.no_grad():
        alone = [made.diffusion_loss(toys.batch(item), 4).item() for item in (7, 2, 9)]
        together = made.diffusion_loss(toys.batch(9, 7, 2), 4).item()
        assert together == pytest.approx(sum(alone) / 3, rel=1e-5)
        assert len({round(loss, 6) for loss in alone}) == 3


def test_noise_depends_on_seed_step_and_item():
    batch = toys.batch(3)
    with torch.no_grad():
        first = objective().diffusion_loss(batch, 1).item()
        assert objective().diffusion_loss(batch, 1).item() == first
        others = [
            objective().diffusion_loss(batch, 2).item(),
            objective(seed=1).diffusion_loss(batch, 1).item(),
            objective().diffusion_loss(batch | {"item": torch.tensor([4])}, 1).item(),
        ]
    assert len({first, *others}) == 4


def test_the_loss_is_the_error_of_the_prediction():
    class Echo(nn.Module):
        """Predicts what it is shown."""

        def forward(self, zt, timestep, embed):
            return zt

    made = objective(unet=Echo(), condition_dropout=0.0)
    made.latent_scale.fill_(2.0)
    batch = toys.batch(5)
    stream = rows(batch, step=3)
    mean, std = made.posterior(batch)
    z0 = 2.0 * (mean + std * stream.randn(*mean.shape[1:]))
    noise, t = stream.randn(*mean.shape[1:]), stream.randint(1000)
    alpha = made.schedule.alphas_cumprod[t].item()
    expected = ((alpha**0.5 * z0 + (1 - alpha) ** 0.5 * noise - noise) ** 2).mean()
    assert made.diffusion_loss(batch, 3).item() == pytest.approx(expected.item(), rel=1e-5)


def test_cached_latents_train_as_the_clips_do(tmp_path):
    made = objective(vae=toys.randomise(toys.vae()))
    encoder = Encoder(
        mel=made.mel, vae=made.vae, clap=made.clap, vocoder=None, tokenizer=made.tokenizer, mixup=made.mixup,
        device="cpu",
    )  # fmt: skip
    encode(
        lambda ranges: (toys.batch(*items) for items in ranges), 3, tmp_path, encoder=encoder, made_by={},
        batch_size=2, shard_items=2, part=0, parts=1, progress=print,
    )  # fmt: skip
    data = Latents(path=str(tmp_path), seed=0, mixup=None)
    assert len(data) == 3 and data.captions() == [*toys.CAPTIONS[:3]]
    cached = collate([(ItemKey(0, i, i), data[ItemKey(0, i, i)], []) for i in (2, 0, 1)])
    with torch.no_grad():
        for step in range(3):
            expected = made.diffusion_loss(toys.batch(2, 0, 1), step).item()
            assert made.diffusion_loss(cached, step).item() == pytest.approx(expected, rel=1e-5)
    scales = []
    for batches in ([toys.batch(2, 0, 1)], [cached]):
        made.prepare(batches)
        scales.append(made.latent_scale.item())
    assert scales[0] == pytest.approx(scales[1], rel=1e-5)


def test_frozen_parts_stay_in_eval_mode_without_gradients_and_out_of_the_state():
    made = objective().train()
    frozen = [made.vae, made.clap, made.vocoder]
    assert made.unet.training and not any(m.training for part in frozen for m in part.modules())
    for _, loss, _ in made.losses(toys.batch(0, 1), 0):
        loss.backward()
    assert not any(p.requires_grad or p.grad is not None for part in frozen for p in part.parameters())
    assert {key.split(".")[0] for key in made.learned_state()} == {"unet", "latent_scale"}


@pytest.mark.parametrize("name", ["vae", "clap", "vocoder"])
def test_a_frozen_part_without_weights_is_refused(name):
    parts = {part: getattr(toys, part)() for part in ("vae", "clap", "vocoder")}
    for part in parts.values():
        part.provenance = {}
    objective(**parts, allow_random_frozen=False)
    parts[name] = getattr(toys, name)()
    with pytest.raises(InputError, match=rf"^{name} is frozen here but has no weights: give {name}=file"):
        objective(**parts, allow_random_frozen=False)


def test_previews_are_sounds_for_the_captions():
    made = objective().eval()
    with torch.no_grad():
        previews = made.preview(toys.batch(0, 1))
        assert list(previews) == ["0_a dog barks", "1_rain on a roof"]
        assert previews["0_a dog barks"].waveform.isfinite().all()
        alone = made.preview(toys.batch(0))["0_a dog barks"]
        assert (alone.mel - previews["0_a dog barks"].mel).abs().max() < 1e-4
        silent = objective(vocoder=None).eval().preview(toys.batch(0))
    assert silent["0_a dog barks"].waveform is None
