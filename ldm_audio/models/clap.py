"""CLAP: contrastive language-audio pretraining (arXiv 2211.06687), an audio and a text tower in one space.

Must match the LAION release and transformers' `ClapModel`: each tower's vector goes through Linear, ReLU,
Linear and is divided by its length. Departure: the transforms of LAION's `mlp_loss` are left out; every
released file holds them, no released training used them.

Axes: b batch, c channels, d width, f mel bins, l text tokens, n mel frames, s samples.
"""

import math

import torch
from torch import Tensor, nn

from ldm_audio.audio.clap_mel import ClapMel
from ldm_audio.errors import InputError
from ldm_audio.layers import unit
from ldm_audio.models.htsat import HTSAT
from ldm_audio.models.roberta import Roberta

INITIAL_LOGIT_SCALE = math.log(1 / 0.07)


def projection(in_dim: int, joint_dim: int) -> nn.Sequential:
    """Head from a tower's width to the joint space."""
    return nn.Sequential(nn.Linear(in_dim, joint_dim), nn.ReLU(), nn.Linear(joint_dim, joint_dim))


class CLAP(nn.Module):
    """Two towers and the two learned scales of the contrastive loss, kept as logarithms.

    A published AudioLDM folder holds the text half alone: its CLAP has `audio_tower` None and refuses audio.
    An audio half alone has `text_tower` None and refuses text.
    """

    def __init__(
        self,
        *,
        front_end: ClapMel,
        audio_tower: HTSAT | None,
        text_tower: Roberta | None,
        joint_dim: int,
    ):
        super().__init__()
        self.front_end = front_end
        self.joint_dim = joint_dim
        self.audio_tower = audio_tower
        self.audio_projection = None if audio_tower is None else projection(audio_tower.out_dim, joint_dim)
        self.text_tower = text_tower
        self.text_projection = None if text_tower is None else projection(text_tower.out_dim, joint_dim)
        self.logit_scale_audio = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))
        self.logit_scale_text = nn.Parameter(torch.tensor(INITIAL_LOGIT_SCALE))

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Trade time for memory: recompute each block of the towers in the backward pass."""
        for tower in (self.audio_tower, self.text_tower):
            if tower is not None:
                tower.set_activation_checkpointing(enabled)

    def repeated_blocks(self) -> list[nn.Module]:
        """The blocks of both towers, which a wrapper may treat one by one."""
        towers = [tower for tower in (self.audio_tower, self.text_tower) if tower is not None]
        return [block for tower in towers for block in tower.repeated_blocks()]

    def embed_audio(self, waveform: Tensor) -> Tensor:
        """(b, s) waveform at `front_end.sample_rate` -> (b, joint_dim) of length 1.

        Raises InputError where there is no audio tower.
        """
        mel, is_longer = self.front_end(waveform)
        return self.embed_mel(mel, is_longer)

    def embed_mel(self, mel: Tensor, is_longer: Tensor) -> Tensor:
        """(b, c, n, f) mel in dB and (b,) bool, as the front end gives them -> (b, joint_dim) of length 1."""
        if self.audio_tower is None or self.audio_projection is None:
            raise InputError("this CLAP has no audio tower: it embeds text only")
        return unit(self.audio_projection(self.audio_tower(mel, is_longer)))

    def embed_text(self, text_tokens: Tensor, text_mask: Tensor) -> Tensor:
        """(b, l) int64 tokens, (b, l) bool True = real token -> (b, joint_dim) of length 1.

        Raises InputError where there is no text tower.
        """
        if self.text_tower is None or self.text_projection is None:
            raise InputError("this CLAP has no text tower: it embeds audio only")
        _, pooled = self.text_tower(text_tokens, text_mask)
        return unit(self.text_projection(pooled))

    def forward(self, waveform: Tensor, text_tokens: Tensor, text_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Waveforms and their texts -> (audio_embed (b, joint_dim), text_embed (b, joint_dim))."""
        return self.embed_audio(waveform), self.embed_text(text_tokens, text_mask)
