"""CLAP (2211.06687, equation 1): symmetric InfoNCE between audio and text embeddings."""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_audio.objectives.base import Logs, Objective, Turn


class ContrastiveObjective(Objective):
    """Trains `clap` on the pairs of a batch; `tokenizer(captions) -> (tokens, mask)` is a plain callable.

    As in the released training, only the audio logit scale is used and it is kept in [0, ln 100].
    `mask_duplicates` leaves pairs with an equal caption out of the negatives, which they are not.
    """

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
        loss, accuracy = self.info_nce(batch)
        logs = {"contrastive": loss, "accuracy": accuracy, "logit_scale": self.clap.logit_scale_audio.exp()}
        yield "clap", loss, logs

    def info_nce(self, batch: dict) -> tuple[Tensor, Tensor]:
        """The symmetric loss and the share of rows whose own partner ranks first, both ways averaged."""
        text_tokens, text_mask = self.tokenizer(batch["caption"])
        device = batch["waveform"].device
        audio_embed, text_embed = self.clap(batch["waveform"], text_tokens.to(device), text_mask.to(device))
        logits = self.clap.logit_scale_audio.exp() * audio_embed @ text_embed.T  # (b audio, b text)
        duplicates = equal_captions(batch["caption"]).to(device) if self.mask_duplicates else None
        return symmetric_info_nce(logits, duplicates)

    def validate(self, batch: dict) -> Logs:
        loss, accuracy = self.info_nce(batch)
        return {"loss": loss, "accuracy": accuracy}


def symmetric_info_nce(logits: Tensor, duplicates: Tensor | None) -> tuple[Tensor, Tensor]:
    """(b, b) logits with partners on the diagonal -> the loss, and the share of partners that rank first.

    Both are means of the two directions. duplicates: (b, b) bool, True where a pair is no negative.
    """
    if duplicates is not None:
        logits = logits.masked_fill(duplicates, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target))
    hits = (logits.argmax(1) == target).float().mean() + (logits.argmax(0) == target).float().mean()
    return loss, hits / 2


def equal_captions(captions: list[str]) -> Tensor:
    """(b, b) bool, True where two different rows have the same caption."""
    number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}
    ids = torch.tensor([number[caption] for caption in captions])
    return (ids[:, None] == ids[None, :]) & ~torch.eye(len(ids), dtype=torch.bool)
