"""From latents to sound: the mel VAE's decoder, then the vocoder (AudioLDM, arXiv 2301.12503, section 3).

Both can go piece by piece, so that memory does not grow with the length. The vocoder sees a bounded
neighbourhood, and its pieces equal the whole. The VAE's decoder does not: its normalisation and its attention
look at all frames, and pieces that are decoded with neighbours only come near the whole.

Axes: b batch, c channels, t latent frames, f mel bins (of the latent or of the mel), n mel frames, s samples.
"""

import torch
from einops import rearrange
from torch import Tensor, nn

from ldm_audio.diffusion.windows import fade_weights, window_starts
from ldm_audio.errors import InputError
from ldm_audio.pipelines.memory import give_back_memory

VOCODER_FRAMES = 512  # mel frames a piece


def decode_latents(
    vae: nn.Module,
    vocoder: nn.Module,
    z: Tensor,
    latent_scale: float,
    num_samples: int,
    *,
    decode_window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(b, c, t, f) latents as the diffusion knows them -> waveform (b, num_samples), log-mel (b, f, n).

    decode_window: latent frames that the VAE decodes at a time, a quarter shared; None: all of them.
    The waveform is cut to its length, as in the originals: a vocoder gives some samples more than hop * n.
    Raises InputError where it gives less than `num_samples`.
    """
    mel = decode_mel(vae, z / latent_scale, decode_window)  # (b, f, n)
    if mel.shape[-1] * vocoder.hop_length < num_samples:
        raise InputError(
            f"num_samples={num_samples}: {mel.shape[-1]} mel frames give {mel.shape[-1] * vocoder.hop_length}"
        )
    give_back_memory()
    return vocode(vocoder, mel)[:, :num_samples], mel


def decode_mel(vae: nn.Module, z: Tensor, decode_window: int | None) -> Tensor:
    """(b, c, t, f) latents of the VAE -> log-mel (b, f, n); in overlapping windows that fade into each other.

    Windows give another mel than the whole: how far from it is in benchmarks/RESULTS.md.
    """
    z = z.to(next(vae.parameters()).dtype)
    if decode_window is None or z.shape[2] <= decode_window:
        return vae.decode(z)
    overlap, frames = decode_window // 4, vae.downsample
    fade = fade_weights(decode_window * frames, overlap * frames).to(z)
    mel, weight = None, z.new_zeros(z.shape[2] * frames)
    for start in window_starts(z.shape[2], decode_window, overlap):
        piece = fade * vae.decode(z[:, :, start : start + decode_window])
        if mel is None:
            mel = piece.new_zeros(*piece.shape[:2], len(weight))
        place = slice(start * frames, (start + decode_window) * frames)
        mel[:, :, place] += piece
        weight[place] += fade
    return mel / weight


def vocode(vocoder: nn.Module, mel: Tensor, piece_frames: int = VOCODER_FRAMES) -> Tensor:
    """(b, f, n) log-mel -> (b, s) waveform, `piece_frames` at a time; equal to the whole at once."""
    mel = mel.to(next(vocoder.parameters()).dtype)
    margin, hop, frames = vocoder.context_frames, vocoder.hop_length, mel.shape[-1]
    if frames <= piece_frames + 2 * margin:
        return rearrange(vocoder(mel), "b 1 s -> b s")
    pieces = []
    for start in range(0, frames, piece_frames):
        before = min(margin, start)
        waveform = vocoder(mel[:, :, start - before : start + piece_frames + margin])
        is_last = start + piece_frames >= frames
        pieces.append(waveform[:, 0, before * hop : None if is_last else (before + piece_frames) * hop])
    return torch.cat(pieces, dim=1)
