import pytest
import torch
import toys

from ldm_audio.errors import InputError
from ldm_audio.models.hifigan import HiFiGAN
from ldm_audio.pipelines.decoding import decode_latents, decode_mel, vocode

LAYOUTS = {
    "toy": toys.arguments(toys.VOCODER_RECIPE),
    "released": {
        "n_mels": 4, "channels": 64, "upsample_rates": [5, 4, 2, 2, 2],
        "upsample_kernels": [16, 16, 8, 4, 4], "resblock_kernels": [3, 7, 11],
        "resblock_dilations": [[1, 3, 5]] * 3, "high_resolution": False,
    },
    "high_resolution": {
        "n_mels": 4, "channels": 64, "upsample_rates": [6, 5, 4, 2, 2],
        "upsample_kernels": [12, 10, 8, 4, 4], "resblock_kernels": [3, 15],
        "resblock_dilations": [[1, 3, 5]] * 2, "high_resolution": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", list(LAYOUTS))
@torch.no_grad()
def test_vocoding_in_pieces_equals_the_whole(name):
    vocoder = toys.randomise(HiFiGAN(**LAYOUTS[name])).double()
    frames = 3 * vocoder.context_frames + 11
    mel = torch.randn(2, LAYOUTS[name]["n_mels"], frames, generator=torch.Generator().manual_seed(0)).double()
    whole = vocoder(mel)[:, 0]
    assert whole.std() > 1e-3
    for piece in (5, 13):
        pieces = vocode(vocoder, mel, piece)
        assert pieces.shape == whole.shape and (pieces - whole).abs().max() < 1e-9


@torch.no_grad()
def test_no_sample_depends_on_frames_beyond_the_context():
    vocoder = toys.randomise(HiFiGAN(**LAYOUTS["released"])).double()
    context, hop = vocoder.context_frames, vocoder.hop_length
    mel = torch.zeros(1, 4, 4 * context).double()
    changed = mel.clone()
    changed[..., 2 * context] = 1.0
    moved = (vocoder(mel) - vocoder(changed))[0, 0].nonzero()[:, 0] / hop
    assert 2 * context - moved.min() < context < 2 * (2 * context - moved.min())  # a bound, and no wild one
    assert moved.max() - 2 * context < context + 1


@torch.no_grad()
def test_windows_of_the_vae_come_near_the_whole_and_one_window_is_the_whole():
    vae = toys.randomise(toys.vae()).double()
    z = torch.randn(2, 4, 60, 8, generator=torch.Generator().manual_seed(0)).double()
    whole = decode_mel(vae, z, None)
    assert torch.equal(decode_mel(vae, z, 60), whole)
    error = (decode_mel(vae, z, 32) - whole).norm() / whole.norm()
    assert 1e-6 < error < 0.5  # random networks look far


def test_too_few_latents_for_the_samples_asked_for_are_refused():
    with pytest.raises(InputError, match="num_samples=9999"):
        decode_latents(toys.vae(), toys.vocoder(), torch.zeros(1, 4, 8, 8), 1.0, 9999)
