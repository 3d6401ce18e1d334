"""What the speech objectives share: a batch's waveforms as the tokens of a trained dVAE, and means over what
is no padding, of which every rank may have another amount.

Axes: b batch, l text tokens, s samples, n mel frames, t speech tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_audio.audio.speech_mel import SpeechMel
from ldm_audio.distributed import max_over_ranks, mean_over_ranks


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


def mean_of_kept(values: Tensor, *, across_ranks: bool) -> Tensor:
    """The mean of the values; if `across_ranks`, its average over ranks is the mean of the values of all."""
    if not across_ranks:
        return values.mean()
    count = torch.tensor(float(values.numel()), device=values.device)
    return values.sum() / mean_over_ranks(count)


def padded_alike(tokens: Tensor, value: int) -> Tensor:
    """(b, l) tokens -> filled up with `value` to the longest of all ranks."""
    longest = int(max_over_ranks(tokens.shape[1]))
    return F.pad(tokens, (0, longest - tokens.shape[1]), value=value)
