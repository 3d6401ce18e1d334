"""CLAP (2211.06687, equation 1): symmetric InfoNCE between audio and text embeddings."""

import hashlib
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_audio.distributed import gather_rows, rank
from ldm_audio.objectives.base import Logs, Objective, Turn


class ContrastiveObjective(Objective):
    """Trains `clap` on the pairs of a batch; `tokenizer(captions) -> (tokens, mask)` is a plain callable.

    As in the released training, only the audio logit scale is used and it is kept in [0, ln 100].
    `mask_duplicates` leaves pairs with an equal caption out of the negatives, which they are not.
    """

    strategies = ("ddp", "fsdp2")

    def __init__(self, *, clap: nn.Module, tokenizer: Callable, mask_duplicates: bool):
        super().__init__()
        self.clap = clap.requires_grad_(True)  # one from a weights file is frozen
        self.clap.logit_scale_text.requires_grad_(False)
        self.tokenizer = tokenizer
        self.mask_duplicates = mask_duplicates

    def players(self) -> dict[str, list[nn.Parameter]]:
        return {"clap": [p for p in self.clap.parameters() if p.requires_grad]}

    def networks(self) -> dict[str, nn.Module]:
        return {"clap": self.clap}

    def losses(self, batch: dict, step: int) -> Iterator[Turn]:
        self.clap.logit_scale_audio.data.clamp_(0.0, math.log(100.0))
        loss, accuracy = self.info_nce(batch, across_ranks=True)
        logs = {"contrastive": loss, "accuracy": accuracy, "logit_scale": self.clap.logit_scale_audio.exp()}
        yield "clap", loss, logs

    def info_nce(self, batch: dict, *, across_ranks: bool) -> tuple[Tensor, Tensor]:
        """The symmetric loss and the share of rows whose own partner ranks first, both ways averaged.

        across_ranks: whether the other ranks' rows are negatives too. Each rank then scores its own rows
        against all, and the mean of the ranks' losses is the loss of the whole batch.
        """
        text_tokens, text_mask = self.tokenizer(batch["caption"])
        device = batch["waveform"].device
        clap = self.parallel(self.clap) if across_ranks else self.clap
        gather = gather_rows if across_ranks else nn.Identity()
        audio_embed, text_embed = clap(batch["waveform"], text_tokens.to(device), text_mask.to(device))
        scale = self.clap.logit_scale_audio.exp()
        by_audio = scale * audio_embed @ gather(text_embed).T  # (b own audios, b all texts)
        by_text = scale * text_embed @ gather(audio_embed).T  # (b own texts, b all audios)
        duplicates = None
        if self.mask_duplicates:
            duplicates = equal_captions(batch["caption"], across_ranks=across_ranks).to(device)
        first = rank() * len(audio_embed) if across_ranks else 0
        return symmetric_info_nce(by_audio, by_text, duplicates, first=first)

    def validate(self, batch: dict) -> Logs:
        loss, accuracy = self.info_nce(batch, across_ranks=False)
        return {"loss": loss, "accuracy": accuracy}


def symmetric_info_nce(
    by_audio: Tensor, by_text: Tensor, duplicates: Tensor | None, *, first: int = 0
) -> tuple[Tensor, Tensor]:
    """(b, n) logits of own rows against all of the other kind -> the loss, and the share that rank first.

    The partner of row i is column first + i; both results are means of the two directions. duplicates:
    (b, n) bool, True where a pair is no negative.
    """
    if duplicates is not None:
        by_audio, by_text = (logits.masked_fill(duplicates, -torch.inf) for logits in (by_audio, by_text))
    target = torch.arange(len(by_audio), device=by_audio.device) + first
    loss = 0.5 * (F.cross_entropy(by_audio, target) + F.cross_entropy(by_text, target))
    hits = [(logits.argmax(1) == target).float().mean() for logits in (by_audio, by_text)]
    return loss, torch.stack(hits).mean()


def equal_captions(captions: list[str], *, across_ranks: bool = False) -> Tensor:
    """(b, n) bool, True where a row has the same caption as another one, of all ranks if `across_ranks`."""
    digests = [hashlib.blake2b(caption.encode(), digest_size=8).digest() for caption in captions]
    own = torch.tensor([int.from_bytes(digest, "little", signed=True) for digest in digests])
    equal = own[:, None] == (gather_rows(own) if across_ranks else own)[None, :]
    first = rank() * len(own) if across_ranks else 0
    equal[:, first : first + len(own)].fill_diagonal_(False)
    return equal
