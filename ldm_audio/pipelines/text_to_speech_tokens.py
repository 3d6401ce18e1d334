"""Text and a voice to speech tokens, as TorToise (arXiv 2305.07243) does up to its diffusion decoder.

An autoregressive model writes many candidates of what a text could sound like; CLVP, which knows how well
tokens say a text, puts the best first; the states that they were written from are what a decoder to sound
takes. Departures: candidates of a text share the cache of their prefix; the places of the tokens are those of
training (`positions="released"` gives the original's); the start token is never written, and the original's
penalty of token 1, an accident, is left out.

Axes: b candidates, d width, f mel bins, l text tokens, n mel frames, r reference clips, s samples, t tokens.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.errors import InputError
from ldm_audio.layers import pack_linears
from ldm_audio.pipelines.token_generation import Positions, Sampling, generate
from ldm_audio.randomness import RowRandom

Tokenizer = Callable[[Sequence[str]], tuple[Tensor, Tensor]]

SILENCE = 1e-4  # the peak of a reference clip that holds nothing
NUM_STOPS = 2  # behind a text in generation, one of them by the original's interface and one by its model
RELEASED_ENDING = (83, 45, 45, 248)  # silence, and the three tokens that end every one of its sequences


@dataclass(frozen=True)
class SpeechCandidates:
    """What was written for one text, the best first; tensors on the CPU."""

    text: str
    tokens: list[Tensor]  # (t,) int64 each, without the stop, or ended as the release ends them
    scores: Tensor  # (b,) CLVP's cosine times its scale
    stopped: list[bool]  # False: cut at max_tokens
    latents: list[Tensor]  # (t, d) float32 each, for as many of the best as were asked for


class TextToSpeechTokens:
    """Holds the parts, which it puts into eval mode; a call turns a text into ranked speech tokens.

    mel: the front end of the voice. ending: the token that fills what follows a stop, and the three that
    end a sequence, in released weights; None where the model was trained without such a habit.
    """

    def __init__(
        self,
        *,
        speech_lm: nn.Module,
        clvp: nn.Module,
        tokenizer: Tokenizer,
        mel: SpeechMel,
        ending: Sequence[int] | None,
    ):
        if mel.n_mels != speech_lm.n_mels:
            raise InputError(f"the voice's mels have {speech_lm.n_mels} bins, the front end's {mel.n_mels}")
        if clvp.speech_tower.vocab_size < speech_lm.num_tokens:
            held = clvp.speech_tower.vocab_size
            raise InputError(f"CLVP knows {held} speech tokens, expected {speech_lm.num_tokens}")
        if ending is not None and (
            len(ending) != 4 or not all(0 <= e < speech_lm.num_tokens for e in ending)
        ):
            raise InputError(f"ending={list(ending)}: expected four speech tokens, or none")
        self.speech_lm = speech_lm.eval()
        self.clvp = clvp.eval()
        self.tokenizer = tokenizer
        self.mel = mel
        self.ending = None if ending is None else tuple(ending)

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.speech_lm.parameters()).device

    def to(self, device: str | torch.device) -> Self:
        """Moves the networks, in place; returns the pipeline."""
        self.speech_lm.to(device)
        self.clvp.to(device)
        return self

    @torch.no_grad()
    def __call__(
        self,
        text: str,
        references: Sequence[Tensor],
        *,
        sample_rate: int,
        num_candidates: int,
        batch_size: int,
        sampling: Sampling,
        max_tokens: int,
        seed: int,
        num_latents: int = 1,
        positions: Positions = "trained",
        pad_to: int | None = None,
        generator: torch.Generator | None = None,
    ) -> SpeechCandidates:
        """A text and clips (s,) of the voice that is to say it -> its candidates, ranked.

        sample_rate: of the clips; must be the front end's. batch_size: candidates at a time. seed: a
        candidate's draws depend on it and on its number alone. num_latents: how many of the best get theirs.
        pad_to: the length that candidates are scored at, 500 in the original. generator: draws the place of a
        long clip's part; without one it is the beginning.

        Raises InputError for what cannot be used. Warns of candidates that did not stop.
        """
        for name, value in (("num_candidates", num_candidates), ("batch_size", batch_size)):
            if value < 1:
                raise InputError(f"{name}={value}: expected 1 or more")
        if not 0 <= num_latents <= num_candidates:
            raise InputError(f"num_latents={num_latents}: expected 0 to num_candidates={num_candidates}")
        text_tokens = self.read(text)
        voice = self.embed_voice(references, sample_rate=sample_rate, generator=generator)
        wrapped = self.speech_lm.wrap_text(text_tokens, num_stops=NUM_STOPS)
        prefix = self.speech_lm.prefix(voice, wrapped)

        keys = [(seed, candidate) for candidate in range(num_candidates)]
        rows = []
        for start in range(0, num_candidates, batch_size):
            drawn = generate(
                self.speech_lm,
                prefix,
                rows=RowRandom(keys[start : start + batch_size]),
                sampling=sampling,
                max_tokens=max_tokens,
                positions=positions,
            )
            rows += drawn.unbind()
        stopped = [bool((row == self.speech_lm.stop).any()) for row in rows]
        if endless := stopped.count(False):
            warnings.warn(
                f"{endless} of {num_candidates} candidates did not stop within max_tokens={max_tokens}",
                stacklevel=2,
            )
        tokens = self.finish(rows, pad_to)
        scores = torch.cat([self.score(text_tokens, tokens[i : i + batch_size])
                            for i in range(0, len(tokens), batch_size)])  # fmt: skip
        order = scores.argsort(descending=True, stable=True).tolist()
        latents = [self.latents(voice, wrapped, tokens[i]) for i in order[:num_latents]]
        return SpeechCandidates(
            text=text,
            tokens=[tokens[i].cpu() for i in order],
            scores=scores[order].float().cpu(),
            stopped=[stopped[i] for i in order],
            latents=latents,
        )

    def pack(self) -> Self:
        """Makes both networks faster on the CPU, for good: see `layers.pack_linears`."""
        pack_linears(self.speech_lm)
        pack_linears(self.clvp)
        return self

    def read(self, text: str) -> Tensor:
        """A text -> (1, l) tokens. InputError where it is too long, and how it may be cut."""
        text_tokens, _ = self.tokenizer([text])
        if text_tokens.shape[1] > self.speech_lm.max_text_tokens:
            raise InputError(
                f"text of {text_tokens.shape[1]} tokens: expected at most {self.speech_lm.max_text_tokens}; "
                "data.english.split_text cuts a text behind its sentences"
            )
        return text_tokens.to(self.device)

    def embed_voice(
        self, references: Sequence[Tensor], *, sample_rate: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Clips (s,) of one voice -> (1, d), the mean of their vectors. InputError names a clip at fault."""
        if sample_rate != self.mel.sample_rate:
            raise InputError(
                f"references at {sample_rate} Hz: expected {self.mel.sample_rate}, resample them"
            )
        if len(references) == 0:
            raise InputError("references is empty: expected at least one clip of the voice")
        shortest = self.mel.n_fft // 2 + 1
        for i, clip in enumerate(references):
            if clip.ndim != 1 or len(clip) < shortest:
                raise InputError(f"references[{i}] {tuple(clip.shape)}: expected (s,), s >= {shortest}")
            if not clip.isfinite().all():
                raise InputError(f"references[{i}]: holds NaN or infinity")
            if clip.abs().max() < SILENCE:
                raise InputError(f"references[{i}]: silent, expected a voice")
        mels = [self.mel.reference(clip[None].to(self.device), generator=generator) for clip in references]
        dtype = next(self.speech_lm.parameters()).dtype
        return self.speech_lm.embed_voice(torch.stack(mels, dim=1).to(dtype))

    def finish(self, rows: Sequence[Tensor], pad_to: int | None) -> list[Tensor]:
        """Drawn rows with their stops -> what is scored and decoded."""
        if self.ending is None:
            return [row[: stop_place(row, self.speech_lm.stop)] for row in rows]
        length = max(pad_to or 0, *map(len, rows))
        return [fix_speech_tokens(row, length, stop=self.speech_lm.stop, ending=self.ending) for row in rows]

    def score(self, text_tokens: Tensor, tokens: Sequence[Tensor]) -> Tensor:
        """(1, l) text tokens, (t,) candidates -> (b,) how well each says the text."""
        heard = [row if len(row) else row.new_zeros(1) for row in tokens]  # nothing is said by one token
        padded = nn.utils.rnn.pad_sequence(list(heard), batch_first=True)  # (b, t)
        lengths = torch.tensor([len(row) for row in heard], device=padded.device)
        mask = torch.arange(padded.shape[1], device=padded.device) < lengths[:, None]
        with_stop = nn.functional.pad(text_tokens, (0, 1), value=self.speech_lm.text_stop)
        speech_mask = None if mask.all() else mask
        return self.clvp.scores(with_stop, padded, speech_mask=speech_mask)[0]

    def latents(self, voice: Tensor, wrapped: Tensor, tokens: Tensor) -> Tensor:
        """(t,) tokens -> (t, d) float32 on the CPU, the states that they were written from."""
        if len(tokens) == 0:
            return torch.zeros(0, voice.shape[1])
        return self.speech_lm.latents(voice, wrapped, tokens[None])[0].float().cpu()


def stop_place(row: Tensor, stop: int) -> int:
    """Where the first stop of a row stands, or its length."""
    places = (row == stop).nonzero()
    return int(places[0]) if len(places) else len(row)


def fix_speech_tokens(row: Tensor, length: int, *, stop: int, ending: Sequence[int]) -> Tensor:
    """A drawn row (t,) -> (length,) as TorToise hands it on: what follows its stop is filled with silence.

    The last three places are always those of `ending`, even over tokens that were meant. A row without a stop
    stays as it is, where it is not shorter than `length`.
    """
    row = nn.functional.pad(row, (0, length - len(row)), value=stop)
    end = stop_place(row, stop)
    if end == length:
        return row
    silence, *last = ending
    fixed = torch.cat([row[:end], row.new_full((length - end,), silence)])
    fixed[-3:] = row.new_tensor(last)[-min(3, length) :]
    return fixed
