"""The next speech token, and beside it the next text token, given text and voice (arXiv 2305.07243).

As in the original: cross-entropies over all places, those behind a text and behind a recording too, where the
stop token is to be predicted; the text's counts `text_weight`. The speech tokens are those of a trained dVAE.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.errors import InputError
from ldm_audio.objectives.base import Logs, Objective, Turn
from ldm_audio.objectives.speech import mean_of_kept, padded_alike, speech_tokens


class SpeechLMObjective(Objective):
    """Trains `speech_lm` on the tokens that `dvae`, frozen, makes of a batch.

    tokenizer(captions) -> (tokens, mask) is a plain callable; a text is padded with the stop token.
    Padding is predicted too, so all ranks pad to the longest of any.
    """

    strategies = ("ddp",)

    def __init__(
        self,
        *,
        mel: SpeechMel,
        speech_lm: nn.Module,
        dvae: nn.Module,
        tokenizer: Callable,
        text_weight: float,
        allow_random_frozen: bool,
    ):
        super().__init__()
        if dvae.num_tokens != speech_lm.num_tokens:
            raise InputError(
                f"the dvae makes {dvae.num_tokens} speech tokens, speech_lm has {speech_lm.num_tokens}"
            )
        self.mel = mel
        self.speech_lm = speech_lm.requires_grad_(True)  # one from a weights file is frozen
        self.dvae = dvae
        self.tokenizer = tokenizer
        self.text_weight = text_weight
        self.frozen = ("dvae",)
        self.freeze_parts(allow_random=allow_random_frozen)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"speech_lm": list(self.speech_lm.parameters())}

    def networks(self) -> dict[str, nn.Module]:
        return {"speech_lm": self.speech_lm}

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        terms = self.terms(batch, across_ranks=True)
        yield "speech_lm", terms["loss"], {key: value for key, value in terms.items() if key != "loss"}

    def terms(self, batch: dict, *, across_ranks: bool) -> Logs:
        """The loss, its terms, and the share of a recording's tokens that were the most likely ones."""
        lm = self.speech_lm
        tokens, mask = speech_tokens(batch, self.mel, self.dvae)
        tokens = tokens.masked_fill(~mask, lm.stop)
        text_tokens = self.tokenizer(batch["caption"])[0].to(tokens.device)
        if across_ranks:
            tokens, text_tokens = padded_alike(tokens, lm.stop), padded_alike(text_tokens, lm.text_stop)
        text = lm.wrap_text(text_tokens, num_stops=1)
        speech = F.pad(F.pad(tokens, (1, 0), value=lm.start), (0, 1), value=lm.stop)  # (b, 1 + t + 1)
        network = self.parallel(lm) if across_ranks else lm
        logits = network(self.voice(batch["references"]), text, speech)
        following = F.pad(speech[:, 1:], (0, 1), value=lm.stop)
        speech_loss = cross_entropy(logits.speech, following)
        hits = (logits.speech.argmax(dim=-1) == following)[:, : mask.shape[1]][mask].float()
        accuracy = mean_of_kept(hits, across_ranks=across_ranks)
        terms = {"loss": speech_loss, "speech": speech_loss, "accuracy": accuracy}
        if logits.text is not None:
            text_loss = cross_entropy(logits.text, F.pad(text[:, 1:], (0, 1), value=lm.text_stop))
            terms |= {"loss": speech_loss + self.text_weight * text_loss, "text": text_loss}
        return terms

    def voice(self, references: Tensor) -> Tensor:
        """(b, r, s) reference clips -> (b, d)."""
        with torch.no_grad():
            mels = self.mel(rearrange(references, "b r s -> (b r) s"))
        return self.speech_lm.embed_voice(rearrange(mels, "(b r) f n -> b r f n", b=len(references)))

    def validate(self, batch: dict) -> Logs:
        return self.terms(batch, across_ranks=False)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """(b, t, v) logits, (b, t) tokens -> the mean over all places."""
    return F.cross_entropy(rearrange(logits, "b t v -> (b t) v"), rearrange(target, "b t -> (b t)"))
