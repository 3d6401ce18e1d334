from itertools import pairwise

import pytest
import torch

from ldm_audio.diffusion.windows import fade_weights, window_starts, windowed
from ldm_audio.errors import InputError


def pointwise(zt, timestep, embed):
    """A network that looks at each frame alone."""
    return torch.sin(zt) + timestep[:, None, None, None] + embed[:, :1, None, None]


def inputs(length):
    generator = torch.Generator().manual_seed(length)
    return torch.randn(2, 3, length, 4, generator=generator), torch.tensor([5, 5]), torch.ones(2, 6)


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17, 40, 101])
@pytest.mark.parametrize("overlap", [0, 1, 3, 7])
def test_windows_cover_every_frame_and_share_enough(length, overlap):
    starts = window_starts(length, 8, overlap)
    if length <= 8:
        assert list(starts) == [0]
        return
    assert starts[0] == 0 and starts[-1] == length - 8
    assert all(0 < b - a <= 8 - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize("length", [5, 8, 9, 20, 33])
def test_windows_do_not_change_what_depends_on_each_frame_alone(length):
    zt, t, embed = inputs(length)
    whole = pointwise(zt, t, embed)
    assert (windowed(pointwise, window=8, overlap=3)(zt, t, embed) - whole).abs().max() < 1e-5


def test_a_short_latent_goes_through_the_network_whole():
    seen = []
    model = windowed(lambda zt, *_: seen.append(zt.shape[2]) or zt, window=8, overlap=2)
    for length in (3, 8, 9):
        model(*inputs(length))
    assert seen == [3, 8, 8, 8]


def test_windows_meet_without_a_seam():
    """Windows that disagree by a constant: the result goes from one to the other in small steps."""
    numbers = iter(range(100))

    def disagreeing(zt, timestep, embed):
        return torch.full_like(zt, float(next(numbers)))

    zt, t, embed = inputs(28)
    out = windowed(disagreeing, window=16, overlap=8)(zt, t, embed)[0, 0, :, 0]
    assert out[0] == 0 and (out.diff() >= 0).all() and out.diff().max() < 0.25


def test_fading_weights_are_symmetric_and_never_nothing():
    weights = fade_weights(10, 4)
    assert torch.equal(weights, weights.flip(0)) and weights.min() > 0 and weights.max() == 1
    assert torch.equal(fade_weights(6, 0), torch.ones(6))


def test_an_overlap_as_long_as_the_window_is_refused():
    with pytest.raises(InputError, match="overlap of 8 latent frames"):
        windowed(pointwise, window=8, overlap=8)
