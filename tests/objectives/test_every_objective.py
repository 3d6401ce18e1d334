"""What the trainer may rely on, for every objective."""

import pytest
import torch
import toys

from ldm_audio.errors import InputError
from ldm_audio.objectives.base import check_players, random_segments
from ldm_audio.randomness import RowRandom

TURNS = {
    "vae": ["discriminator", "vae"],
    "vocoder": ["discriminator", "vocoder"],
    "contrastive": ["clap"],
    "dvae": ["dvae"],
    "speech_lm": ["speech_lm"],
    "clvp": ["clvp"],
    "latent_diffusion": ["unet"],
}
every_objective = pytest.mark.parametrize("name", sorted(TURNS))


@every_objective
def test_gradients_reach_exactly_the_player_whose_turn_it_is(name):
    objective = toys.objective(name).train()
    players = objective.players()
    for network in objective.networks().values():
        toys.randomise(network)
    for step in range(2):  # the second step starts with what the first one left switched off
        turns = []
        for player, loss, _ in objective.losses(toys.batch(0, 1), step):
            turns.append(player)
            loss.backward()
            reached = {id(p) for p in objective.parameters() if p.grad is not None}
            assert reached == {id(p) for p in players[player]}
            assert sum(p.grad.abs().sum() for p in players[player]) > 0
            objective.zero_grad(set_to_none=True)
        assert turns == TURNS[name]


@every_objective
def test_players_own_every_learning_parameter_once(name):
    check_players(toys.objective(name))


def test_players_that_leave_out_or_share_a_parameter_are_a_bug():
    objective = toys.objective("vae")
    players = objective.players()
    for wrong, message in (
        ({"vae": players["vae"]}, "owned by no player"),
        ({**players, "third": players["vae"][:1]}, "belongs to two players"),
    ):
        objective.players = lambda wrong=wrong: wrong
        with pytest.raises(AssertionError, match=message):
            check_players(objective)


@every_objective
def test_the_loss_falls_on_one_batch(name):
    alone = {"adversarial_start": 10**9} if "discriminator" in TURNS[name] else {}
    objective = toys.objective(name, **alone).train()
    batch = toys.batch(0, 1, 2, 3)
    (parameters,) = (p for player, p in objective.players().items() if player != "discriminator")
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(32):
        ((_, loss, _),) = objective.losses(batch, 0)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0], losses


@pytest.mark.parametrize("name, term", [("vae", "l1"), ("vocoder", "mel")])
def test_the_adversaries_learn_beside_a_falling_distance(name, term):
    objective = toys.objective(name).train()
    optimizers = {player: torch.optim.Adam(p, lr=5e-3) for player, p in objective.players().items()}
    seen = {"discriminator": [], term: []}
    for _ in range(25):
        for player, loss, logs in objective.losses(toys.batch(0, 1), 0):
            optimizers[player].zero_grad()
            loss.backward()
            optimizers[player].step()
            for key in seen.keys() & logs.keys():
                seen[key].append(logs[key].item())
    assert seen["discriminator"][-1] < 0.9 * seen["discriminator"][0]
    assert seen[term][-1] < 0.8 * seen[term][0]


@every_objective
def test_the_learned_state_is_what_learns_and_goes_back_strictly(name):
    objective, other = toys.objective(name), toys.objective(name)
    for network in other.networks().values():
        toys.randomise(network)
    state = {key: value.clone() for key, value in other.learned_state().items()}
    assert not any(key.startswith(tuple(f"{part}." for part in objective.frozen)) for key in state)
    learning = {key for key, p in objective.named_parameters() if p.requires_grad}
    assert learning <= state.keys()
    objective.load_learned_state(state)
    for key, value in objective.learned_state().items():
        assert torch.equal(value, state[key]), key
    missing = sorted(learning)[0]
    del state[missing]
    with pytest.raises(InputError, match=f"1 keys differ, first {missing}"):
        objective.load_learned_state(state)


@every_objective
def test_validation_and_preview_repeat_themselves_and_draw_nothing_from_the_global_generator(name):
    objective = toys.objective(name).eval()
    batch = toys.batch(0, 1, 2)
    before = torch.get_rng_state()
    with torch.no_grad():
        first, again = objective.validate(batch), objective.validate(batch)
        previews = objective.preview(batch)
    assert torch.equal(before, torch.get_rng_state())
    assert objective.monitor.removeprefix("val/") in first
    assert {key: float(value) for key, value in first.items()} == {key: float(again[key]) for key in again}
    for preview in previews.values():
        assert preview.mel.shape[0] == toys.MEL["n_mels"] and preview.mel.isfinite().all()
        assert preview.waveform is None or (preview.waveform.ndim, preview.sample_rate) == (1, toys.RATE)
    assert (name in ("contrastive", "clvp", "speech_lm")) == (previews == {})


@every_objective
def test_a_network_from_a_weights_file_learns_on(name):
    """Networks come out of files frozen."""
    part = {"latent_diffusion": "unet", "contrastive": "clap"}.get(name, name)
    network = getattr(toys, part)().requires_grad_(False).eval()
    objective = toys.objective(name, **{part: network}).train()
    check_players(objective)
    assert network.training


def test_segments_of_a_row_depend_on_its_own_key():
    waveform = toys.waveforms(torch.arange(3))
    together = random_segments(waveform, 100, RowRandom([(0, 5, item) for item in range(3)]))
    for item in range(3):
        alone = random_segments(waveform[item : item + 1], 100, RowRandom([(0, 5, item)]))
        assert torch.equal(alone[0], together[item])
    whole = random_segments(waveform, toys.SAMPLES, RowRandom([(0, 0, 0)] * 3))
    assert torch.equal(whole, waveform)
