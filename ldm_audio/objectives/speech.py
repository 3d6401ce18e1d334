"""What the speech objectives share: a batch's waveforms as the tokens of a trained dVAE.

Axes: b batch, s samples, n mel frames, t speech tokens.
"""

import torch
from torch import Tensor, nn

from ldm_audio.audio.speech_mel import SpeechMel


def num_samples_of(batch: dict) -> Tensor:
    """(b,) how many samples of each waveform are there; all, where the batch does not say."""
    waveform = batch["waveform"]
    whole = torch.full((len(waveform),), waveform.shape[1], device=waveform.device)
    return batch.get("num_samples", whole)


def lengths_mask(lengths: Tensor, longest: int) -> Tensor:
    """(b,) lengths -> (b, longest) bool, True for the places within each."""
    return torch.arange(longest, device=lengths.device) < lengths[:, None]


@torch.no_grad()
def speech_tokens(batch: dict, mel: SpeechMel, dvae: nn.Module) -> tuple[Tensor, Tensor]:
    """The tokens of a batch's waveforms -> ((b, t) int64, (b, t) bool True = within the recording).

    As in the original, one token more is kept than the whole ones of a recording.
    """
    tokens = dvae.encode(mel(batch["waveform"])).tokens
    samples = mel.hop_length * dvae.frames_per_token
    lengths = (num_samples_of(batch) // samples + 1).clamp(max=tokens.shape[1])
    longest = int(lengths.max())
    return tokens[:, :longest], lengths_mask(lengths, longest)
