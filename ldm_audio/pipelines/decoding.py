"""From latents to sound: the mel VAE's decoder, then the vocoder (AudioLDM, arXiv 2301.12503, section 3).

Axes: b batch, c channels, t latent frames, f mel bins (of the latent or of the mel), n mel frames, s samples.
"""

from einops import rearrange
from torch import Tensor, nn

from ldm_audio.errors import InputError


def decode_latents(
    vae: nn.Module, vocoder: nn.Module, z: Tensor, latent_scale: float, num_samples: int
) -> tuple[Tensor, Tensor]:
    """(b, c, t, f) latents as the diffusion knows them -> waveform (b, num_samples), log-mel (b, f, n).

    The waveform is cut to its length, as in the originals: a vocoder gives some samples more than hop * n.
    Raises InputError where it gives less than `num_samples`.
    """
    mel = vae.decode(z / latent_scale)  # (b, f, n)
    waveform = rearrange(vocoder(mel), "b 1 s -> b s")
    if waveform.shape[-1] < num_samples:
        raise InputError(
            f"num_samples={num_samples}: {mel.shape[-1]} mel frames give {waveform.shape[-1]} samples"
        )
    return waveform[:, :num_samples], mel
