"""The terms of the autoencoder's loss, against hand computations."""

import pytest
import torch
import toys
from torch import nn

from ldm_audio.objectives.vae import VAEObjective


class Judge(nn.Module):
    """A discriminator whose logit is its only weight times the mean of the picture."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, picture):
        return self.weight * picture.mean(dim=(1, 2, 3))


class OneLayer(nn.Module):
    """What the adaptive weight looks at: a last layer of two weights."""

    def __init__(self):
        super().__init__()
        self.last_layer = nn.Parameter(torch.zeros(2))


def turns(objective: VAEObjective, step: int = 0) -> dict[str, tuple]:
    return {player: (loss, logs) for player, loss, logs in objective.losses(toys.batch(0, 1), step)}


@pytest.mark.parametrize(
    "nll, fooled, expected",
    [
        ((3.0, 4.0), (0.0, 2.0), 0.5 * 5 / 2.0001),
        ((30.0, 40.0), (0.0, 0.0), 0.5 * 1e4),  # 50 / 1e-4 is cut at 1e4
        ((0.0, 0.0), (1.0, 1.0), 0.0),
    ],
)
def test_the_adaptive_weight_is_the_quotient_of_the_gradients_at_the_last_layer(nll, fooled, expected):
    objective = toys.vae_objective(vae=OneLayer(), adversarial_weight=0.5)
    layer = objective.vae.last_layer
    weight = objective.adaptive_weight(
        (layer * torch.tensor(nll)).sum(), (layer * torch.tensor(fooled)).sum()
    )
    assert weight.item() == pytest.approx(expected, rel=1e-6)
    assert not weight.requires_grad and layer.grad is None


def test_the_last_layer_is_the_decoders():
    vae = toys.vae()
    assert vae.last_layer is vae.decoder.conv_out.weight


def test_the_autoencoders_loss_is_the_sum_of_its_weighted_terms():
    torch.manual_seed(0)
    objective = toys.vae_objective(kl_weight=7.0, perceptual_weight=0.3)
    loss, logs = turns(objective)["vae"]
    elements = 16 * 16  # mel bins x frames of a segment
    expected = (logs["l1"] + 0.3 * logs["perceptual"]) * elements + 7.0 * logs["kl"]
    expected = expected + logs["adversarial_weight"] * logs["adversarial"]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert min(logs["kl"], logs["perceptual"], logs["l1"], logs["adversarial_weight"]) > 0


def test_the_discriminators_loss_is_the_hinge():
    torch.manual_seed(0)
    objective = toys.vae_objective(discriminator=Judge(0.2))
    loss, _ = turns(objective)["discriminator"]
    mel = objective.mel(toys.batch(0, 1)["waveform"])
    fake = turns(objective)["vae"][1]["adversarial"].item() / -0.2  # mean of the reconstructions
    real = 0.2 * mel.mean(dim=(1, 2))
    assert real.max() < 1 and 0.2 * fake > -1  # no hinge is closed
    assert loss.item() == pytest.approx(0.5 * ((1 - real).mean().item() + 1 + 0.2 * fake), rel=1e-5)


def test_the_autoencoder_answers_the_updated_discriminator():
    torch.manual_seed(0)
    objective = toys.vae_objective(discriminator=Judge(0.2))
    before = turns(objective)["vae"][1]["adversarial"].item()
    generator = objective.losses(toys.batch(0, 1), 0)
    next(generator)
    objective.discriminator.weight.data.fill_(0.6)
    _, _, logs = next(generator)
    assert logs["adversarial"].item() == pytest.approx(3 * before, rel=1e-5)


def test_the_discriminator_waits_for_its_start():
    objective = toys.vae_objective(adversarial_start=3)
    objective.discriminator.forward = None  # would fail if it were called
    assert list(turns(objective, step=2)) == ["vae"]
    assert "adversarial" not in turns(objective, step=2)["vae"][1]
    assert list(turns(toys.vae_objective(adversarial_start=3), step=3)) == ["discriminator", "vae"]


def test_a_new_autoencoder_starts_at_the_mean_of_the_mels_and_a_trained_one_where_it_was():
    batches = [toys.batch(0, 1), toys.batch(2, 3)]
    objective = toys.vae_objective()
    objective.prepare(batches)
    expected = torch.stack([objective.mel(batch["waveform"]).mean() for batch in batches]).mean()
    assert torch.allclose(objective.vae.decoder.conv_out.bias, expected)

    trained = toys.vae()
    trained.provenance = {}
    bias = trained.decoder.conv_out.bias.clone()
    toys.vae_objective(vae=trained).prepare(batches)
    assert torch.equal(trained.decoder.conv_out.bias, bias)


def test_the_perceptual_distance_does_not_learn():
    perceptual = nn.Conv1d(1, 1, 1)
    objective = toys.vae_objective(perceptual=perceptual).train()
    assert not any(p.requires_grad for p in perceptual.parameters()) and not perceptual.training
    assert not any(key.startswith("perceptual") for key in objective.learned_state())
