"""The autoregressive speech model against transformers' decoder, and its cache against itself."""

import pytest
import speech_toys as toys
import torch

from ldm_audio.errors import InputError


@pytest.fixture(scope="module")
def peer():
    return toys.theirs()


@pytest.fixture(scope="module")
def ours(peer):
    return toys.speech_lm_from(peer.state_dict())


def draw(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(1, high, shape, generator=torch.Generator().manual_seed(2))


def mels(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_the_prefix_equals_transformers_conditioning_encoder(peer, ours):
    text, mel = draw(250, 2, 9), mels(2, 80, 21)
    expected = peer.conditioning_encoder(input_features=mel, input_ids=text)
    prefix = ours.prefix(ours.embed_voice(mel[:, None]), ours.wrap_text(text, num_stops=1))
    assert prefix.shape == (2, 1 + 11, 64)
    assert (prefix - expected).abs().max() <= 1e-5


@torch.no_grad()
def test_teacher_forced_logits_equal_transformers(peer, ours):
    """Positions as trained: theirs are subtracted beforehand, because their decoder adds its own to all."""
    decoder = peer.speech_decoder_model
    text, mel, speech = draw(250, 2, 7), mels(2, 80, 15), draw(29, 2, 12)
    voice, wrapped = ours.embed_voice(mel[:, None]), ours.wrap_text(text, num_stops=2)
    given = torch.cat([torch.full((2, 1), ours.start), speech], dim=1)
    embeds = torch.cat([ours.prefix(voice, wrapped), ours.embed_speech(given)], dim=1)
    places = decoder.model.decoder.position_embeds_layer(torch.arange(embeds.shape[1]))
    expected = decoder(inputs_embeds=embeds - places, attention_mask=torch.ones(embeds.shape[:2]))
    logits = ours(voice, wrapped, given)
    assert logits.text is None
    assert (logits.speech - expected.logits[:, -13:]).abs().max() <= 1e-5
    states = decoder.final_norm(decoder.model(inputs_embeds=embeds - places).last_hidden_state)
    latents = ours.latents(voice, wrapped, speech)
    assert (latents - states[:, -13:-1]).abs().max() <= 1e-5


@torch.no_grad()
def test_clips_are_averaged_as_vectors(ours):
    clips = mels(1, 3, 80, 10)
    each = torch.stack([ours.embed_voice(clips[:, i : i + 1]) for i in range(3)])
    assert torch.allclose(ours.embed_voice(clips), each.mean(0), atol=1e-6)


@torch.no_grad()
def test_steps_with_a_cache_give_the_logits_of_the_whole_sequence(ours):
    voice, wrapped = ours.embed_voice(mels(1, 1, 80, 8)), ours.wrap_text(draw(250, 1, 6), num_stops=2)
    given = torch.cat([torch.full((3, 1), ours.start), draw(29, 3, 9)], dim=1)
    whole = ours(voice.expand(3, -1), wrapped.expand(3, -1), given).speech
    cache = ours.open_cache(ours.prefix(voice, wrapped), num_rows=3, max_tokens=10)
    steps = [ours.step(given[:, i], i, cache) for i in range(10)]
    assert (torch.stack(steps, dim=1) - whole).abs().max() <= 1e-5


@torch.no_grad()
def test_a_reordered_cache_goes_on_from_other_rows(ours):
    prefix = ours.prefix(ours.embed_voice(mels(1, 1, 80, 8)), ours.wrap_text(draw(250, 1, 6), num_stops=2))
    cache = ours.open_cache(prefix, num_rows=2, max_tokens=4)
    ours.step(torch.tensor([ours.start] * 2), 0, cache)
    ours.step(torch.tensor([3, 7]), 1, cache)
    cache.reorder(torch.tensor([1, 1]))
    after = ours.step(torch.tensor([5, 5]), 2, cache)
    other = ours.open_cache(prefix, num_rows=1, max_tokens=4)
    for place, token in enumerate((ours.start, 7, 5)):
        expected = ours.step(torch.tensor([token]), place, other)
    assert (after - expected).abs().max() <= 1e-5


def test_a_place_does_not_see_what_follows():
    network = toys.network(toys.SPEECH_LM_RECIPE)
    voice, wrapped = network.embed_voice(mels(1, 1, 80, 8)), network.wrap_text(draw(250, 1, 6), num_stops=1)
    given = draw(29, 1, 8)
    changed = given.clone()
    changed[:, 5:] = 1
    one, other = (network(voice, wrapped, tokens) for tokens in (given, changed))
    assert torch.equal(one.text, other.text)
    assert torch.allclose(one.speech[:, :5], other.speech[:, :5], atol=1e-6)
    assert not torch.allclose(one.speech[:, 5:], other.speech[:, 5:], atol=1e-3)


def test_activation_checkpointing_changes_no_gradient():
    network = toys.network(toys.SPEECH_LM_RECIPE).train()
    gradients = []
    for enabled in (False, True):
        network.set_activation_checkpointing(enabled)
        network.zero_grad()
        voice, wrapped = network.embed_voice(mels(1, 1, 80, 8)), network.wrap_text(draw(9, 1, 6), num_stops=1)
        logits = network(voice, wrapped, draw(29, 1, 8))
        (logits.speech.square().sum() + logits.text.square().sum()).backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-3) for a, b in zip(*gradients))


def test_a_new_conditioning_encoder_passes_its_first_frame():
    from ldm_audio.models.speech_lm import SpeechLM

    made = SpeechLM(**{k: v for k, v in toys.SPEECH_LM_RECIPE.items() if k != "_target_"})
    mel = mels(1, 80, 5)
    assert torch.allclose(made.conditioning(mel), made.conditioning.proj(mel)[..., 0])
    assert made.blocks[0].mlp[2].weight.std() < 0.6 * made.blocks[0].mlp[0].weight.std()


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.wrap_text(draw(9, 1, 22), num_stops=2), "22 text tokens: expected at most 21"),
        (lambda m: m.wrap_text(torch.tensor([[256]]), num_stops=2), "text tokens: expected each"),
        (lambda m: m.embed_speech(torch.tensor([[32]])), "speech tokens: expected each to be 0 to 31"),
        (lambda m: m.embed_speech(torch.zeros(1, 34, dtype=torch.int64)), "34 speech tokens: .* at most 33"),
        (lambda m: m.embed_voice(torch.zeros(1, 1, 79, 5)), r"reference mels \(1, 1, 79, 5\)"),
        (lambda m: toys.network({**toys.SPEECH_LM_RECIPE, "dim": 66}), "dim=66: expected a multiple of 4"),
        (lambda m: toys.network({**toys.SPEECH_LM_RECIPE, "num_heads": 5}), "dim=64 is not divisible"),
    ],
)
def test_what_does_not_fit_is_refused(ours, call, message):
    with pytest.raises(InputError, match=message):
        call(ours)
