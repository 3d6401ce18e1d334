"""HiFi-GAN's loss against hand computations, and what is left of the weight norm in the saved weights."""

import pytest
import torch
import toys
from torch import nn

from ldm_audio.objectives.vocoder import feature_distance, same_length


class Judge(nn.Module):
    """Two discriminators whose logit and only feature are a weight times the mean of the samples' squares."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.0, 2.0]))

    def forward(self, waveform):
        power = (waveform**2).mean(dim=(1, 2))
        return [((w * power)[:, None], [w * power]) for w in self.weights]


def test_the_saved_weights_are_folded_and_sound_the_same():
    objective = toys.objective("vocoder", adversarial_start=10**9)
    optimizer = torch.optim.Adam(objective.players()["vocoder"], lr=1e-2)
    mel = objective.mel(toys.batch(0, 1)["waveform"])
    sounds = []
    for step in range(2):
        ((_, loss, _),) = objective.losses(toys.batch(0, 1), step)
        loss.backward()
        optimizer.step()
        saved = objective.weights()["vocoder"]
        assert saved.state_dict().keys() == toys.vocoder().state_dict().keys()
        with torch.no_grad():
            sounds.append(saved(mel))
            assert (sounds[-1] - objective.vocoder(mel)).abs().max() < 1e-6
    assert (sounds[0] - sounds[1]).abs().max() > 1e-5  # it follows the training
    assert not any("folded" in key for key in objective.learned_state())


def test_losses_are_least_squares_plus_features_plus_mel():
    torch.manual_seed(0)
    objective = toys.vocoder_objective(discriminator=Judge(), segment_samples=toys.SAMPLES)
    batch = toys.batch(0, 1)
    (_, first, _), (_, second, logs) = objective.losses(batch, 0)
    with torch.no_grad():
        real, fake = batch["waveform"], objective.vocoder(objective.mel(batch["waveform"])).squeeze(1)
        fake, real = same_length(fake, real)
        powers = [w * (x**2).mean(dim=1) for w in (1.0, 2.0) for x in (real, fake)]
        mel = (objective.mel(fake) - objective.mel(real)).abs().mean()
    one_real, one_fake, two_real, two_fake = powers
    judged = ((1 - one_real) ** 2 + one_fake**2).mean() + ((1 - two_real) ** 2 + two_fake**2).mean()
    fooled = ((1 - one_fake) ** 2).mean() + ((1 - two_fake) ** 2).mean()
    features = (one_real - one_fake).abs().mean() + (two_real - two_fake).abs().mean()
    assert first.item() == pytest.approx(judged.item(), rel=1e-5)
    assert second.item() == pytest.approx((fooled + 2.0 * features + 45.0 * mel).item(), rel=1e-5)
    for name, value in {"adversarial": fooled, "features": features, "mel": mel}.items():
        assert logs[name].item() == pytest.approx(value.item(), rel=1e-5)


def test_feature_distances_are_means_within_and_sums_over_maps_and_discriminators():
    zeros, ones = torch.zeros(2, 3), torch.ones(2, 3)
    real = [(zeros, [zeros, zeros[:, :1]]), (zeros, [ones])]
    fake = [(zeros, [2 * ones, ones[:, :1]]), (zeros, [zeros])]
    assert feature_distance(real, fake).item() == 2 + 1 + 1


def test_the_discriminator_waits_for_its_start():
    objective = toys.vocoder_objective(adversarial_start=3)
    objective.discriminator.forward = None  # would fail if it were called
    ((player, loss, logs),) = objective.losses(toys.batch(0, 1), 2)
    assert player == "vocoder" and logs.keys() == {"mel"}
    assert loss.item() == pytest.approx(45.0 * logs["mel"].item())


def test_sound_shorter_than_a_segment_is_used_whole():
    objective = toys.vocoder_objective(segment_samples=2 * toys.SAMPLES)
    assert len(list(objective.losses(toys.batch(0), 0))) == 2


def test_both_are_cut_to_the_shorter():
    short, long = torch.zeros(2, 5), torch.zeros(2, 8)
    assert [x.shape[1] for x in (*same_length(short, long), *same_length(long, short))] == [5] * 4
