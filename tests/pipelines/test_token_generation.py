"""Drawing tokens: against transformers' generate and its processors, cached against uncached."""

import math

import pytest
import speech_toys as toys
import torch

from ldm_audio.errors import InputError
from ldm_audio.pipelines.token_generation import (
    GREEDY,
    Sampling,
    beam_search,
    choose,
    generate,
    penalise,
)
from ldm_audio.randomness import RowRandom


@pytest.fixture(scope="module")
def peer():
    return toys.theirs(seed=4)


@pytest.fixture(scope="module")
def ours(peer):
    return toys.speech_lm_from(peer.state_dict())


@pytest.fixture(scope="module")
def prefix(ours) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    text = torch.randint(1, 250, (1, 7), generator=generator)
    mel = torch.randn(1, 1, 80, 12, generator=generator)
    return ours.prefix(ours.embed_voice(mel), ours.wrap_text(text, num_stops=2))


def rows(count: int) -> RowRandom:
    return RowRandom([(0, i) for i in range(count)])


def their_generate(peer, prefix: torch.Tensor, **settings) -> torch.Tensor:
    """Their decoder as it was meant: with a mask for the prefix and the start token that it adds."""
    mask = torch.ones(1, prefix.shape[1] + 1, dtype=torch.int64)
    tokens = peer.speech_decoder_model.generate(
        conditioning_embeds=prefix, attention_mask=mask, eos_token_id=31, pad_token_id=31,
        suppress_tokens=[30], **settings,
    )  # fmt: skip
    return tokens[:, 1:]


def uncached(ours, prefix: torch.Tensor, count: int) -> torch.Tensor:
    """Greedy tokens with the whole sequence computed anew for each."""
    tokens = torch.tensor([[ours.start]])
    for _ in range(count):
        x = torch.cat([prefix, ours.embed_speech(tokens)], dim=1)
        logits = ours.speech_head(ours.hidden(x))[:, -1]
        logits[:, ours.start] = -torch.inf
        tokens = torch.cat([tokens, logits.argmax(1)[:, None]], dim=1)
    return tokens[:, 1:]


@torch.no_grad()
def test_cached_and_uncached_generation_agree_token_for_token(ours, prefix):
    cached = generate(ours, prefix, rows=rows(3), sampling=GREEDY, max_tokens=20)
    whole = uncached(ours, prefix, cached.shape[1])
    assert all(torch.equal(row, whole[0]) for row in cached)
    assert len(set(whole[0].tolist())) > 3  # not one token over and over
    released = generate(ours, prefix, rows=rows(1), sampling=GREEDY, max_tokens=20, positions="released")
    assert released.shape != whole.shape or not torch.equal(released, whole)


def test_greedy_tokens_with_released_positions_equal_transformers(peer, ours, prefix):
    expected = their_generate(peer, prefix, do_sample=False, max_new_tokens=24)
    tokens = generate(ours, prefix, rows=rows(1), sampling=GREEDY, max_tokens=24, positions="released")
    assert tokens.tolist() == expected.tolist()
    penalised = Sampling(temperature=0.0, top_k=None, top_p=1.0, repetition_penalty=1.7)
    expected = their_generate(peer, prefix, do_sample=False, max_new_tokens=24, repetition_penalty=1.7)
    again = generate(ours, prefix, rows=rows(1), sampling=penalised, max_tokens=24, positions="released")
    assert again.tolist() == expected.tolist() != tokens.tolist()


@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beams_equal_transformers(peer, ours, prefix, length_penalty):
    expected = their_generate(
        peer, prefix, do_sample=False, num_beams=3, num_return_sequences=3, max_new_tokens=9,
        length_penalty=length_penalty,
    )  # fmt: skip
    tokens, scores = beam_search(
        ours, prefix, num_beams=3, length_penalty=length_penalty, repetition_penalty=1.0, max_tokens=9,
        positions="released",
    )  # fmt: skip
    assert tokens.tolist() == expected.tolist()
    assert scores.tolist() == sorted(scores.tolist(), reverse=True)


def test_one_beam_is_greedy_and_more_are_no_worse(ours, prefix):
    settings = {"length_penalty": 0.0, "repetition_penalty": 1.0, "max_tokens": 10}
    greedy = generate(ours, prefix, rows=rows(1), sampling=GREEDY, max_tokens=10)
    tokens, one = beam_search(ours, prefix, num_beams=1, **settings)
    assert torch.equal(tokens, greedy)
    assert beam_search(ours, prefix, num_beams=4, **settings)[1][0] >= one[0] - 1e-4


@pytest.mark.parametrize("penalty, temperature, top_k, top_p", [(2.0, 0.8, 5, 0.9), (1.0, 1.3, None, 0.9)])
def test_what_may_be_drawn_is_what_transformers_leaves(penalty, temperature, top_k, top_p):
    from transformers import (
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(0))
    before = torch.tensor([[3, 7, 3]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(before, logits) if penalty != 1 else logits
    seen = torch.zeros(1, 12, dtype=torch.bool).scatter_(1, before, True)
    assert torch.allclose(penalise(logits, seen, penalty), expected)
    steps = [TemperatureLogitsWarper(temperature)]
    steps += [TopKLogitsWarper(top_k)] if top_k else []
    for step in [*steps, TopPLogitsWarper(top_p)]:
        expected = step(before, expected)
    expected = expected.softmax(1)[0]

    count = 20000
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    drawn = choose(logits.expand(count, -1), seen.expand(count, -1), sampling, Uniform(count))
    share = torch.bincount(drawn, minlength=12) / count
    assert (share - expected).abs().max() <= 1.5 / count
    assert 1 < (expected > 0).sum() < 12


class Uniform:
    """Every place of the unit interval once, so that shares are probabilities."""

    def __init__(self, count: int):
        self.count = count

    def rand(self, *shape: int) -> torch.Tensor:
        return ((torch.arange(self.count, dtype=torch.float64) + 0.5) / self.count)[:, None]


def test_a_row_is_the_same_in_any_batch_and_rows_differ(ours, prefix):
    sampling = Sampling(temperature=1.5, top_k=None, top_p=1.0, repetition_penalty=1.0)
    together = generate(ours, prefix, rows=rows(4), sampling=sampling, max_tokens=12)
    alone = generate(ours, prefix, rows=RowRandom([(0, 2)]), sampling=sampling, max_tokens=12)
    length = alone.shape[1]
    assert torch.equal(together[2, :length], alone[0])
    assert len({tuple(row.tolist()) for row in together}) == 4
    assert not (together == ours.start).any()


class Scripted:
    """A model that writes given tokens."""

    start, stop, max_speech_tokens = 4, 5, 9

    def __init__(self, *scripts: list[int]):
        self.scripts = scripts
        self.positions: list[int] = []

    def open_cache(self, prefix, *, num_rows, max_tokens):
        return None

    def step(self, tokens, position, cache):
        logits = torch.zeros(len(self.scripts), 6)
        for row, script in enumerate(self.scripts):
            logits[row, script[len(self.positions)]] = 9.0
        logits[:, self.start] = 10.0  # the most likely, and never drawn
        self.positions.append(position)
        return logits


def test_rows_stop_on_their_own_and_stay_stopped():
    model = Scripted([1, 5, 2, 3], [2, 3, 5, 1])
    tokens = generate(model, torch.zeros(1, 2, 3), rows=rows(2), sampling=GREEDY, max_tokens=9)
    assert tokens.tolist() == [[1, 5, 5], [2, 3, 5]]
    assert model.positions == [0, 1, 2]
    model = Scripted([1] * 9)
    tokens = generate(
        model, torch.zeros(1, 2, 3), rows=rows(1), sampling=GREEDY, max_tokens=4, positions="released"
    )
    assert tokens.tolist() == [[1] * 4]  # one that never stops is bounded
    assert model.positions == [0, 2, 3, 4]


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"temperature": -1.0}, "temperature=-1"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": 0}, "top_k=0: expected 1 or more"),
        ({"top_p": 0.0}, "top_p=0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        Sampling(**setting)


def test_lengths_and_positions_that_do_not_exist_are_refused(ours, prefix):
    for length in (0, 33):
        with pytest.raises(InputError, match=f"max_tokens={length}: expected 1 to 32"):
            generate(ours, prefix, rows=rows(1), sampling=GREEDY, max_tokens=length)
    with pytest.raises(InputError, match="positions='other'"):
        generate(ours, prefix, rows=rows(1), sampling=GREEDY, max_tokens=3, positions="other")
    with pytest.raises(InputError, match="num_beams=0"):
        beam_search(ours, prefix, num_beams=0, length_penalty=1.0, repetition_penalty=1.0, max_tokens=3)
