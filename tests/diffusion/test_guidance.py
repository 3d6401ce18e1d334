import pytest
import torch

from ldm_audio.diffusion.guidance import classifier_free
from ldm_audio.errors import InputError


class Recorder:
    """A network whose output tells time step and condition apart, and which remembers its calls."""

    def __init__(self):
        self.calls = []

    def __call__(self, zt, timestep, embed):
        self.calls.append((zt, timestep, embed))
        return zt * embed.sum(1)[:, None, None, None] + timestep[:, None, None, None]


def inputs(rows=3):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, 2, 4, 5, generator=generator)
    embed, uncond = torch.randn(2, rows, 6, generator=generator)
    return z, torch.full((rows,), 40), embed, uncond


def test_guidance_is_one_batched_call_of_uncond_then_cond():
    z, t, embed, uncond = inputs()
    model = Recorder()
    prediction = classifier_free(model, embed, uncond, 2.5)(z, t)
    assert len(model.calls) == 1
    seen_z, seen_t, seen_embed = model.calls[0]
    assert torch.equal(seen_z, torch.cat([z, z])) and torch.equal(seen_t, torch.cat([t, t]))
    assert torch.equal(seen_embed, torch.cat([uncond, embed]))
    without, given = Recorder()(z, t, uncond), Recorder()(z, t, embed)
    assert torch.equal(prediction, without + 2.5 * (given - without))


def test_scale_1_is_the_conditional_prediction_from_half_the_work():
    z, t, embed, uncond = inputs()
    model = Recorder()
    prediction = classifier_free(model, embed, uncond, 1.0)(z, t)
    assert [len(call[0]) for call in model.calls] == [3]
    assert torch.equal(prediction, Recorder()(z, t, embed))


def test_scale_0_is_the_unconditional_prediction():
    z, t, embed, uncond = inputs()
    assert torch.equal(classifier_free(Recorder(), embed, uncond, 0.0)(z, t), Recorder()(z, t, uncond))


def test_one_unconditional_row_serves_all():
    z, t, embed, uncond = inputs()
    one = classifier_free(Recorder(), embed, uncond[:1], 3.0)(z, t)
    assert torch.equal(one, classifier_free(Recorder(), embed, uncond[:1].repeat(3, 1), 3.0)(z, t))


@pytest.mark.parametrize("rescale", [0.3, 1.0])
def test_rescale_equals_diffusers(rescale):
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

    z, t, embed, uncond = inputs()
    plain = classifier_free(Recorder(), embed, uncond, 4.0)(z, t)
    ours = classifier_free(Recorder(), embed, uncond, 4.0, rescale=rescale)(z, t)
    theirs = rescale_noise_cfg(plain, Recorder()(z, t, embed), guidance_rescale=rescale)
    assert (ours - theirs).abs().max() < 1e-5


def test_full_rescale_restores_each_rows_deviation():
    z, t, embed, uncond = inputs()
    ours = classifier_free(Recorder(), embed, uncond, 4.0, rescale=1.0)(z, t)
    cond = Recorder()(z, t, embed)
    assert torch.allclose(ours.std((1, 2, 3)), cond.std((1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("t, guided", [(99, False), (100, True), (300, True), (500, True), (501, False)])
def test_outside_the_interval_the_condition_alone_speaks(t, guided):
    z, _, embed, uncond = inputs()
    model = Recorder()
    timestep = torch.full((3,), t)
    prediction = classifier_free(model, embed, uncond, 2.0, interval=(100, 500))(z, timestep)
    assert len(model.calls[0][0]) == (6 if guided else 3)
    assert torch.equal(prediction, Recorder()(z, timestep, embed)) != guided


@pytest.mark.parametrize("scale", [-1.0, float("nan")])
def test_a_scale_that_is_no_scale_is_refused(scale):
    _, _, embed, uncond = inputs()
    with pytest.raises(InputError, match="guidance_scale"):
        classifier_free(Recorder(), embed, uncond, scale)


def test_a_rescale_outside_0_to_1_is_refused():
    _, _, embed, uncond = inputs()
    with pytest.raises(InputError, match=r"rescale=1\.2"):
        classifier_free(Recorder(), embed, uncond, 2.0, rescale=1.2)
