"""Edits with random networks: what is kept is kept, whatever the networks make of the rest."""

from functools import partial

import pytest
import torch
import toys

from ldm_audio.audio.io import write_wav
from ldm_audio.diffusion.samplers import ddim, dpm_solver, timestep_grid
from ldm_audio.errors import InputError
from ldm_audio.pipelines.editing import (
    Continuation,
    Inpainting,
    StyleTransfer,
    SuperResolution,
    encode,
)
from ldm_audio.pipelines.text_to_audio import shortened

RATE = toys.RATE
SETTINGS = {
    "num_steps": 5, "guidance_scale": 2.0, "sampler": partial(ddim, eta=1.0), "spacing": "leading", "seed": 1,
    "batch_size": 2,
}  # fmt: skip
PROMPTS = ["a bell rings twice", "rain on a roof"]


@pytest.fixture(scope="module")
def pipeline():
    return toys.pipeline()


@pytest.fixture(scope="module")
def recording():
    """(s,): 1.03 seconds of noise and a tone, its peak at 0.3."""
    noise = torch.randn(16480, generator=torch.Generator().manual_seed(0))
    waveform = 0.2 * noise + torch.sin(torch.arange(16480) * 0.2)
    return 0.3 * waveform / waveform.abs().max()


def edited(pipeline, edit, duration=None, **changes):
    return pipeline(PROMPTS, duration=duration, edit=edit, **SETTINGS | changes).waveforms


@pytest.mark.parametrize(
    "mask", [[(0.2, 0.5)], [(0.0, 0.3)], [(0.7, 5.0)], [(0.1, 0.2), (0.15, 0.4), (0.8, 0.9)]]
)
@pytest.mark.parametrize("sampler", [partial(ddim, eta=1.0), dpm_solver], ids=["ddim", "dpm_solver"])
def test_inpainting_leaves_every_sample_outside_the_mask_as_it_was(pipeline, recording, mask, sampler):
    out = edited(pipeline, Inpainting(path=recording, mask=mask), sampler=sampler)
    inside = torch.zeros(len(recording), dtype=torch.bool)
    for start, end in mask:
        inside[round(start * RATE) : round(end * RATE)] = True
    assert out.shape == (2, len(recording))
    assert torch.equal(out[:, ~inside], recording[~inside].expand(2, -1))
    assert ((out - recording)[:, inside].abs() > 1e-5).float().mean() > 0.9


def test_inpainting_fades_without_a_step(pipeline, recording):
    """Over the cross-fade the result goes from one waveform to the other: no sample jumps to the new one."""
    edit = Inpainting(path=recording, mask=[(0.2, 0.5)])
    keep = edit.keeper(recording, RATE)
    out = keep(torch.full((1, len(recording)), 9.0))[0] - recording
    edge = round(0.2 * RATE)
    assert out[edge - 1] == 0 and out[edge] < 0.001 and out[edge + 320] == pytest.approx(9, abs=1)
    assert out.diff().abs().max() < 0.5 + 2 * recording.abs().max()


@pytest.mark.parametrize(
    "mask, message",
    [
        ([], "covers nothing"),
        ([(2.0, 3.0)], "covers nothing of the waveform, 1.03 seconds"),
        ([(0, 2)], "covers all of the waveform"),
        ([(0, 0.6), (0.6, 1.03)], "covers all"),
        ([(0.5, 0.5)], "start below end"),
        ([(-1, 0.5)], "start below end"),
        ([(0.1, 0.2, 0.3)], "start below end"),
        ([(0.1, float("inf"))], "start below end"),
    ],
)
def test_masks_that_cover_nothing_or_everything_are_refused(pipeline, recording, mask, message):
    with pytest.raises(InputError, match=message):
        edited(pipeline, Inpainting(path=recording, mask=mask))


def test_the_network_sees_the_kept_part_at_the_noise_of_each_step(pipeline, recording, monkeypatch):
    """At the last step, where hardly any noise is left, that is the recording's own latents."""
    seen = []
    forward = pipeline.unet.forward
    monkeypatch.setattr(
        pipeline.unet, "forward", lambda zt, t, e: seen.append((int(t[0]), zt)) or forward(zt, t, e)
    )
    edited(pipeline, Inpainting(path=recording, mask=[(0.2, 0.5)]), num_steps=50)
    z0 = encode(pipeline, 0.5 / recording.abs().max() * recording)
    t, zt = seen[-1]
    signal, sigma = pipeline.schedule.rates(torch.tensor([t]), zt[:1])
    noise = (zt[:1] - signal * z0)[0] / sigma[0]
    assert t == 1 and noise[:, :10].std() == pytest.approx(1, abs=0.1)
    assert noise[:, :10].abs().max() < 5 < noise[:, 12:23].abs().max()


@pytest.mark.parametrize("cutoff", [1000.0, 3000.0, 6000.0])
def test_super_resolution_keeps_the_spectrum_below_the_cut(pipeline, recording, cutoff):
    out = edited(pipeline, SuperResolution(path=recording, cutoff=cutoff))
    window = torch.hann_window(1024)
    theirs, ours = (
        torch.stft(x, 1024, 256, window=window, return_complex=True) for x in (recording[None], out)
    )
    below = torch.arange(513) * RATE / 1024 <= cutoff
    error = (ours - theirs)[:, below].abs().square().sum() / 2 / theirs[:, below].abs().square().sum()
    assert error < 1e-4  # -40 dB
    assert ((ours - theirs)[:, ~below].abs().square().sum() / theirs[:, ~below].abs().square().sum()) > 0.01


@pytest.mark.parametrize("cutoff", [0, -5, 7950, 9000, float("nan")])
def test_cuts_with_nothing_below_or_above_are_refused(pipeline, recording, cutoff):
    with pytest.raises(InputError, match="cutoff="):
        edited(pipeline, SuperResolution(path=recording, cutoff=cutoff))


def test_super_resolution_makes_anew_all_latent_bins_that_reach_above_the_cut(pipeline, recording):
    shape = pipeline.latent_shape(len(recording))[1:]
    counts = [
        SuperResolution(path=recording, cutoff=cutoff)
        .keep_mask(pipeline, len(recording), shape)[0]
        .sum()
        .item()
        for cutoff in (100.0, 1000.0, 3000.0, 7000.0)
    ]
    assert counts == sorted(counts) and counts[0] == 0 and 0 < counts[1] < counts[-1] < shape[1]


def test_continuation_is_the_recording_and_more(pipeline, recording):
    out = edited(pipeline, Continuation(path=recording), duration=1.9)
    assert out.shape == (2, round(1.9 * RATE))
    kept = len(recording) - 256 - 320
    assert torch.equal(out[:, :kept], recording[:kept].expand(2, -1))
    assert out[:, len(recording) :].std() > 1e-4 and (out[0] - out[1])[len(recording) :].abs().max() > 1e-4
    for duration in (None, 0.5, 1.03):
        with pytest.raises(InputError, match=r"expected more than the 1\.03 seconds"):
            edited(pipeline, Continuation(path=recording), duration=duration)


def test_continuation_may_be_longer_than_a_window(pipeline, recording):
    out = edited(pipeline, Continuation(path=recording), duration=2.2, window=0.8, overlap=0.2)
    assert out.shape == (2, round(2.2 * RATE)) and torch.equal(out[0, :15000], recording[:15000])


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.5, float("nan")])
@pytest.mark.parametrize("make", [StyleTransfer, partial(Inpainting, mask=[(0, 1)])])
def test_strengths_outside_0_to_1_are_refused(recording, strength, make):
    with pytest.raises(InputError, match="strength="):
        make(path=recording, strength=strength)


def test_the_stronger_the_style_transfer_the_further_from_the_recording(pipeline, recording):
    """Told by the latents that come out of a network that sees nothing but noise: it keeps what is there."""
    z0 = encode(pipeline, 0.5 / recording.abs().max() * recording)
    distances = []
    for strength in (0.02, 0.3, 0.6, 1.0):
        source = StyleTransfer(path=recording, strength=strength).prepare(pipeline, None)
        steps, level = shortened(timestep_grid(50, pipeline.schedule, "leading"), 1000, source)
        assert len(steps) == round(50 * strength) and level == steps[0] and torch.equal(source.z0, z0)
        distances.append(1 - pipeline.schedule.alphas_cumprod[level].sqrt().item())
    assert distances == sorted(distances) and distances[0] < 0.01 and distances[-1] > 0.9
    tiny, full = (edited(pipeline, StyleTransfer(path=recording, strength=s)) for s in (0.01, 1.0))
    assert tiny.shape == full.shape == (2, len(recording)) and (tiny - full).abs().max() > 1e-4


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing", "log_snr"])
def test_a_strength_is_the_same_noise_however_the_steps_are_spaced(pipeline, recording, spacing):
    source = StyleTransfer(path=recording, strength=0.6).prepare(pipeline, None)
    for num_steps in (50, 200):
        _, level = shortened(timestep_grid(num_steps, pipeline.schedule, spacing), 1000, source)
        assert 600 - 1000 / num_steps - 20 <= level < 600
    assert len(shortened(timestep_grid(1, pipeline.schedule, spacing), 1000, source)[0]) == 1


def test_audioldms_style_transfer_starts_one_step_noisier(pipeline, recording):
    grid = timestep_grid(10, pipeline.schedule, "leading")
    for strength, matched, audioldm in ((0.5, 401, 501), (1.0, 901, 901), (0.01, 1, 101)):
        levels = [
            shortened(
                grid,
                1000,
                StyleTransfer(path=recording, strength=strength, start=start).prepare(pipeline, None),
            )[1]
            for start in ("matched", "audioldm")
        ]
        assert levels == [matched, audioldm]


def test_a_weak_style_transfer_by_a_perfect_network_is_the_vaes_round_trip(pipeline, recording, monkeypatch):
    """A network that knows the recording's latents denoises to them, whatever the prompt and the strength."""
    z0 = encode(pipeline, 0.5 / recording.abs().max() * recording)

    def knows(zt, t, embed):
        signal, sigma = pipeline.schedule.rates(t, zt)
        return (zt - signal * z0) / sigma

    monkeypatch.setattr(pipeline, "predict", knows)
    out = edited(pipeline, StyleTransfer(path=recording, strength=0.4), sampler=partial(ddim, eta=0.0))
    mel = pipeline.mel(0.5 / recording.abs().max() * torch.nn.functional.pad(recording, (0, 160))[None])
    with torch.no_grad():
        trip = pipeline.vocoder(pipeline.vae.decode(z0[None] / pipeline.latent_scale))[0, 0, : len(recording)]
    assert mel.shape[-1] == z0.shape[1] * pipeline.vae.downsample
    ours = out[0] * (0.5 / recording.abs().max())
    assert (ours - trip).norm() / trip.norm() < 0.2  # the schedule's end leaves a little noise


def test_loudness_comes_back(pipeline, recording):
    """Twice the recording is twice the result: the networks hear both at one level."""
    quiet, loud = (
        edited(pipeline, StyleTransfer(path=gain * recording, strength=0.5)) for gain in (1.0, 2.0)
    )
    assert (2 * quiet - loud).abs().max() < 1e-4
    silent = edited(pipeline, StyleTransfer(path=0 * recording, strength=0.5))
    assert silent.isfinite().all()


def test_an_edit_is_the_same_in_any_batch(recording):
    """In float64: random networks magnify the last bits of float32."""
    pipeline = toys.pipeline()
    for network in (pipeline.unet, pipeline.vae, pipeline.vocoder, pipeline.clap):
        network.double()
    for edit in (StyleTransfer(path=recording, strength=0.5), Inpainting(path=recording, mask=[(0.2, 0.5)])):
        together = edited(pipeline, edit)
        alone = pipeline(PROMPTS[1:], duration=None, edit=edit, **SETTINGS | {"batch_size": 1}).waveforms
        assert (together[1] - alone[0]).abs().max() < 1e-5


def test_recordings_of_any_rate_are_read_and_named_when_they_cannot_be(pipeline, recording, tmp_path):
    path = tmp_path / "a.wav"
    write_wav(path, recording, RATE, subtype="FLOAT")
    edit = {"mask": [(0.2, 0.5)]}
    from_file, given = (edited(pipeline, Inpainting(path=p, **edit)) for p in (path, recording))
    assert torch.equal(from_file, given)
    write_wav(path, recording, 8000)
    assert edited(pipeline, Inpainting(path=path, **edit)).shape[1] == 2 * len(recording)
    assert edited(pipeline, Inpainting(path=path, **edit), duration=0.7).shape[1] == 11200
    with pytest.raises(InputError, match=r"duration=9: .*a\.wav has 2\.06 seconds"):
        edited(pipeline, Inpainting(path=path, **edit), duration=9)
    (tmp_path / "b.wav").write_text("no sound")
    for name, message in (("b.wav", "not a readable audio file"), ("none.wav", "no such file")):
        with pytest.raises(InputError, match=message):
            edited(pipeline, StyleTransfer(path=tmp_path / name, strength=0.5))
