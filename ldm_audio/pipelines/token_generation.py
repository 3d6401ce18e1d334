"""Tokens drawn one after the other from a model with a cache: greedy, by chance, or by beam search.

Must match `generate` of transformers where both do the same: repetition penalty, temperature, top-k, top-p
in this order, beams ranked by log-probability over length to the `length_penalty`. Departures: the start
token is never drawn, and each row draws from a random stream of its own.

Axes: b rows (candidates or beams), l prefix places, d width, t tokens, v vocabulary, k tokens that are left.
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_audio.errors import InputError
from ldm_audio.randomness import RowRandom

Positions = Literal["trained", "released"]


class Cache(Protocol):
    """What a model remembers of the tokens it was fed."""

    def reorder(self, rows: Tensor) -> None: ...


class TokenModel(Protocol):
    """What is generated from; see `models.speech_lm.SpeechLM`."""

    start: int
    stop: int
    max_speech_tokens: int

    def open_cache(self, prefix: Tensor, *, num_rows: int, max_tokens: int) -> Cache: ...
    def step(self, tokens: Tensor, position: int, cache: Cache) -> Tensor: ...


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; the values given here are TorToise's.

    temperature: 0 takes the most likely. top_k: how many of the most likely are left (50 is not said in the
    original's code but was its library's default); None leaves all. top_p: the fewest most likely whose
    probabilities come to this are left. repetition_penalty: what the logit of a token that was there already
    is divided by, or, below 0, multiplied by; 1 does nothing.
    """

    temperature: float = 0.8
    top_k: int | None = 50
    top_p: float = 0.8
    repetition_penalty: float = 2.0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise InputError(f"temperature={self.temperature}: expected 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise InputError(f"top_k={self.top_k}: expected 1 or more, or none")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: expected more than 0, up to 1")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(f"repetition_penalty={self.repetition_penalty}: expected more than 0")


GREEDY = Sampling(temperature=0.0, top_k=None, top_p=1.0, repetition_penalty=1.0)


@torch.no_grad()
def generate(
    model: TokenModel,
    prefix: Tensor,
    *,
    rows: RowRandom,
    sampling: Sampling,
    max_tokens: int,
    positions: Positions = "trained",
) -> Tensor:
    """One continuation of the prefix (1, l, d) for each stream in `rows` -> (b, t) tokens, t <= max_tokens.

    Each row ends with the stop token, which also fills what follows it; a row without one reached max_tokens.
    positions: that of token i when it is fed is i + 1, as in training, or i + 2, as in the released code with
    its cache, and in transformers.
    """
    check_length(model, max_tokens, positions)
    cache = model.open_cache(prefix, num_rows=len(rows), max_tokens=max_tokens)
    token = torch.full((len(rows),), model.start, device=prefix.device)
    stopped = torch.zeros_like(token, dtype=torch.bool)
    seen, tokens = None, []
    for number in range(max_tokens):
        logits = model.step(token, fed_at(number, positions), cache).float()
        logits[:, model.start] = -torch.inf
        seen = torch.zeros_like(logits, dtype=torch.bool) if seen is None else seen
        token = choose(logits, seen, sampling, rows).masked_fill(stopped, model.stop)
        seen.scatter_(1, token[:, None], True)
        tokens.append(token)
        stopped = stopped | (token == model.stop)
        if stopped.all():
            break
    return torch.stack(tokens, dim=1)


def fed_at(number: int, positions: Positions) -> int:
    """The position of the token before the generated token `number`."""
    return number + int(positions == "released" and number > 0)


def check_length(model: TokenModel, max_tokens: int, positions: Positions) -> None:
    if positions not in ("trained", "released"):
        raise InputError(f"positions={positions!r}: expected 'trained' or 'released'")
    if not 1 <= max_tokens <= model.max_speech_tokens:
        raise InputError(f"max_tokens={max_tokens}: expected 1 to {model.max_speech_tokens}")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(b, v) logits, those of tokens in `seen` (b, v) made less likely."""
    if penalty == 1:
        return logits
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def choose(logits: Tensor, seen: Tensor, sampling: Sampling, rows: RowRandom) -> Tensor:
    """(b, v) logits of the next token, (b, v) bool True = was there already -> (b,) tokens."""
    logits = penalise(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(dim=1)
    left = min(sampling.top_k or logits.shape[1], logits.shape[1])
    values, tokens = logits.topk(left, dim=1)  # (b, k), falling
    probabilities = (values / sampling.temperature).softmax(dim=1)
    more_likely = probabilities.cumsum(dim=1) - probabilities
    probabilities = probabilities.masked_fill(more_likely >= sampling.top_p, 0.0)
    reached = probabilities.cumsum(dim=1)  # (b, k), up to the row's total
    drawn = rows.rand(1).to(reached) * reached[:, -1:]
    place = (reached <= drawn).sum(dim=1, keepdim=True).clamp(max=left - 1)
    return tokens.gather(1, place)[:, 0]


@torch.no_grad()
def beam_search(
    model: TokenModel,
    prefix: Tensor,
    *,
    num_beams: int,
    length_penalty: float,
    repetition_penalty: float,
    max_tokens: int,
    positions: Positions = "trained",
) -> tuple[Tensor, Tensor]:
    """The `num_beams` best continuations found -> ((num_beams, t) tokens, (num_beams,) scores), best first.

    A score is the sum of the log-probabilities over length ** length_penalty, the stop token counted in both:
    more than 0 favours long ones. The search ends when `num_beams` have stopped and none that goes on could
    still be better at its present length. Without a stop, a row reached max_tokens.
    """
    check_length(model, max_tokens, positions)
    if num_beams < 1:
        raise InputError(f"num_beams={num_beams}: expected 1 or more")
    cache = model.open_cache(prefix, num_rows=num_beams, max_tokens=max_tokens)
    token = torch.full((num_beams,), model.start, device=prefix.device)
    beams = token.new_empty(num_beams, 0)
    sums = torch.full((num_beams,), -torch.inf, device=prefix.device)
    sums[0] = 0.0  # all beams begin the same: only one of them counts
    found: list[tuple[float, Tensor]] = []
    for number in range(max_tokens):
        logits = model.step(token, fed_at(number, positions), cache).float()
        logits[:, model.start] = -torch.inf
        seen = torch.zeros_like(logits, dtype=torch.bool).scatter_(1, beams, True)
        steps = penalise(logits.log_softmax(dim=1), seen, repetition_penalty)
        totals = (sums[:, None] + steps).flatten()
        best, places = totals.topk(min(2 * num_beams, len(totals)))  # enough beside those that stop
        beam, token = places // logits.shape[1], places % logits.shape[1]
        stops = token == model.stop
        for rank in stops.nonzero()[:, 0].tolist():
            if rank < num_beams:  # a stop that is not among the best is no end
                ended = torch.cat([beams[beam[rank]], token[rank : rank + 1]])
                found.append((best[rank].item() / (number + 1) ** length_penalty, ended))
        found = sorted(found, key=lambda end: -end[0])[:num_beams]
        going = (~stops).nonzero()[:num_beams, 0]
        sums, token = best[going], token[going]
        beams = torch.cat([beams[beam[going]], token[:, None]], dim=1)
        cache.reorder(beam[going])
        highest = sums[0].item() / (number + 1) ** length_penalty
        if len(found) == num_beams and found[-1][0] >= highest:
            break
    if len(found) < num_beams:
        length = beams.shape[1] ** length_penalty
        found += [(total.item() / length, row) for total, row in zip(sums, beams)]
    found = sorted(found, key=lambda end: -end[0])[:num_beams]
    longest = max(len(row) for _, row in found)
    tokens = torch.stack([F.pad(row, (0, longest - len(row)), value=model.stop) for _, row in found])
    return tokens, torch.tensor([score for score, _ in found])
