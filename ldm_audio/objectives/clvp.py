"""CLVP (arXiv 2305.07243): symmetric InfoNCE between texts and the speech tokens of a trained dVAE.

As in the original, tokens are left out at random, `text_masking` and `speech_masking` of them. Departure:
padding is left out too, where the original hears it.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.distributed import gather_rows, rank
from ldm_audio.errors import InputError
from ldm_audio.objectives.base import Logs, Objective, Turn
from ldm_audio.objectives.contrastive import equal_captions, symmetric_info_nce
from ldm_audio.objectives.speech import speech_tokens
from ldm_audio.randomness import RowRandom


class CLVPObjective(Objective):
    """Trains `clvp` on the pairs of a batch; `tokenizer(captions) -> (tokens, mask)` is a plain callable.

    mask_duplicates leaves pairs with an equal text out of the negatives, which they are not.
    """

    strategies = ("ddp",)

    def __init__(
        self,
        *,
        mel: SpeechMel,
        clvp: nn.Module,
        dvae: nn.Module,
        tokenizer: Callable,
        seed: int,
        text_masking: float,
        speech_masking: float,
        mask_duplicates: bool,
        allow_random_frozen: bool,
    ):
        super().__init__()
        if dvae.num_tokens > clvp.speech_tower.vocab_size:
            known = clvp.speech_tower.vocab_size
            raise InputError(f"the dvae makes {dvae.num_tokens} speech tokens, clvp knows {known}")
        for name, share in (("text_masking", text_masking), ("speech_masking", speech_masking)):
            if not 0 <= share < 1:
                raise InputError(f"{name}={share}: expected 0 to less than 1")
        self.mel = mel
        self.clvp = clvp.requires_grad_(True)  # one from a weights file is frozen
        self.dvae = dvae
        self.tokenizer = tokenizer
        self.seed = seed
        self.text_masking = text_masking
        self.speech_masking = speech_masking
        self.mask_duplicates = mask_duplicates
        self.frozen = ("dvae",)
        self.freeze_parts(allow_random=allow_random_frozen)

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"clvp": list(self.clvp.parameters())}

    def networks(self) -> dict[str, nn.Module]:
        return {"clvp": self.clvp}

    def averaged(self) -> dict[str, nn.Module]:
        return {"clvp": self.clvp}

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        loss, accuracy = self.info_nce(batch, step)
        yield "clvp", loss, {
            "contrastive": loss, "accuracy": accuracy, "logit_scale": self.clvp.logit_scale.exp(),
        }  # fmt: skip

    def info_nce(self, batch: dict, step: int | None) -> tuple[Tensor, Tensor]:
        """The loss and the share of partners that rank first, both ways averaged.

        step: of training, in which tokens are left out and the other ranks' rows are negatives too: each rank
        scores its own rows against all. None leaves nothing out and asks no other rank.
        """
        speech, speech_mask = speech_tokens(batch, self.mel, self.dvae)
        text, text_mask = (t.to(speech.device) for t in self.tokenizer(batch["caption"]))
        # One stop behind each text, as behind those that are ranked; the padding is the stop's token already.
        text, text_mask = F.pad(text, (0, 1)), F.pad(text_mask, (1, 0), value=True)
        training = step is not None
        if training:
            keys = [(self.seed, step, int(item)) for item in batch["item"]]
            text_mask = leave_out(text_mask, self.text_masking, RowRandom([(*key, 0) for key in keys]))
            speech_mask = leave_out(speech_mask, self.speech_masking, RowRandom([(*key, 1) for key in keys]))
        clvp = self.parallel(self.clvp) if training else self.clvp
        gather = gather_rows if training else nn.Identity()
        text_embed, speech_embed = clvp(text, speech, text_mask, speech_mask)
        scale = self.clvp.logit_scale.exp()
        by_text = scale * text_embed @ gather(speech_embed).T  # (b own texts, b all recordings)
        by_speech = scale * speech_embed @ gather(text_embed).T  # (b own recordings, b all texts)
        duplicates = None
        if self.mask_duplicates:
            duplicates = equal_captions(batch["caption"], across_ranks=training).to(by_text.device)
        first = rank() * len(by_text) if training else 0
        return symmetric_info_nce(by_speech, by_text, duplicates, first=first)

    def validate(self, batch: dict) -> Logs:
        loss, accuracy = self.info_nce(batch, None)
        return {"loss": loss, "accuracy": accuracy}


def leave_out(mask: Tensor, share: float, rows: RowRandom) -> Tensor:
    """(b, l) mask with about `share` of its places taken out, in no row all of them."""
    kept = mask & (rows.rand(mask.shape[1]).to(mask.device) >= share)
    return torch.where(kept.any(dim=1, keepdim=True), kept, mask)
