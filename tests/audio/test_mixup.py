"""Who is mixed with whom, from where, and how: the properties of beat-synchronous mixup."""

import math

import numpy as np
import pytest
import torch
import toys
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_audio.audio.beats import Beats
from ldm_audio.audio.mixup import (
    Mix,
    TempoGroups,
    folded,
    mix_caption,
    mix_posteriors,
    mix_waveforms,
    plan_mix,
    silence_tail,
    whole_tempo,
)
from ldm_audio.errors import InputError

WINDOW = 10.24


def track(tempo: float, seconds: float = 30.0, first: float = 0.3) -> Beats:
    beats = np.arange(first, seconds, 60 / tempo).tolist()
    return Beats(tuple(beats), tuple(beats[::4]), seconds)


def plan(
    tracks: list[Beats], *, seed: int = 0, index: int = 0, window: float = WINDOW, **changes
) -> Mix | None:
    mixup = toys.mixup(**changes)
    groups = TempoGroups([whole_tempo(beats) for beats in tracks], mixup)
    rng = np.random.default_rng(seed)
    return plan_mix(mixup, groups, index, lambda other: tracks[other], window=window, rng=rng)


def partners(tempos: list[float], index: int, **changes) -> list[int]:
    return TempoGroups([round(tempo) for tempo in tempos], toys.mixup(**changes)).partners(index)


def test_buckets_have_the_edges_of_the_original():
    tempos = [119.4, 119.6, 120.6, 122.4, 122.6]  # 1.2 apart may be split and 2.8 apart be joined
    assert partners(tempos, 0) == partners(tempos, 4) == []
    assert partners(tempos, 1) == [2, 3] and partners(tempos, 3) == [1, 2]


def test_tempos_are_rounded_half_to_even_as_the_original_does():
    two_minutes = [Beats((*(np.arange(n) * (120.0 / n)).tolist(), 120.0), (), 121.0) for n in (201, 203)]
    assert [beats.tempo for beats in two_minutes] == [100.5, 101.5]
    assert [whole_tempo(beats) for beats in two_minutes] == [100, 102]


def test_a_tolerance_joins_what_is_nearer_than_its_width():
    tempos = [118, 119, 120, 121, 123]
    assert partners(tempos, 2, tempo_match="tolerance") == [0, 1, 3]
    assert partners(tempos, 2, tempo_match="tolerance", tempo_width=1) == []


def test_any_tempo_matches_where_no_width_is_given_or_a_large_one():
    tempos = [0, 60, 100, 174]
    assert partners(tempos, 1, tempo_width=None) == partners(tempos, 1, tempo_width=2000) == [0, 2, 3]


def test_octaves_match_only_where_they_are_folded():
    assert [folded(tempo) for tempo in (0, 60, 70, 139, 140, 300)] == [0, 120, 70, 139, 70, 75]
    assert partners([60, 120, 121, 99], 0) == []
    assert partners([60, 120, 121, 99], 0, octave_fold=True) == [1, 2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 200), min_size=1, max_size=30), st.sampled_from(["bucket", "tolerance"]))
def test_partners_are_those_that_comparing_all_pairs_finds(tempos, match):
    mixup = toys.mixup(tempo_match=match)
    groups = TempoGroups(tempos, mixup)
    for i, one in enumerate(tempos):
        near = [
            j
            for j, other in enumerate(tempos)
            if j != i and (one // 3 == other // 3 if match == "bucket" else abs(one - other) < 3)
        ]
        assert groups.partners(i) == near
        drawn = {groups.draw(i, np.random.default_rng(seed)) for seed in range(8)}
        assert drawn <= set(near) if near else drawn == {None}


def test_every_partner_is_drawn_equally_often_and_never_the_anchor():
    mixup = toys.mixup()
    rng = np.random.default_rng(0)
    counts = np.bincount([TempoGroups([120] * 5, mixup).draw(2, rng) for _ in range(2000)], minlength=5)
    assert counts[2] == 0 and np.all(np.abs(np.delete(counts, 2) - 500) < 90)
    own = TempoGroups([120] * 5, toys.mixup(allow_self=True))
    assert 2 in {own.draw(2, rng) for _ in range(50)}


def test_both_begin_at_a_downbeat_and_enough_of_both_remains():
    tracks = [track(120, 14.0), track(121, 16.0, first=0.7)]
    for seed in range(30):
        mix = plan(tracks, seed=seed)
        assert mix.start in tracks[0].downbeats and mix.partner_start in tracks[1].downbeats
        assert 14.0 - mix.start >= 5.12 and 16.0 - mix.partner_start >= 5.12
        assert mix.seconds == pytest.approx(min(14.0 - mix.start, 16.0 - mix.partner_start, WINDOW))


@settings(max_examples=40, deadline=None)
@given(st.floats(60, 180), st.floats(0, 1.4), st.floats(0, 0.4), st.integers(0, 999))
def test_later_beats_drift_apart_no_more_than_the_tempos_do(tempo, gap, first, seed):
    tracks = [track(tempo), track(tempo + gap, first=first)]
    mix = plan(tracks, seed=seed, tempo_match="tolerance")
    assert mix is not None
    ours = [beat - mix.start for beat in tracks[0].beats if mix.start <= beat < mix.start + mix.seconds]
    theirs = np.array(tracks[1].beats) - mix.partner_start
    assert len(ours) >= 5  # at 60 a minute in 5.12 s
    for beat in ours:
        # after t seconds the count of beats differs by t * gap / 60, each 60 / tempo seconds long
        assert np.abs(theirs - beat).min() <= beat * gap / tempo + 1e-6


def test_without_downbeats_nothing_is_mixed_unless_asked_for():
    beats_only = Beats(track(120).beats, (), 30.0)
    tracks = [track(120), beats_only]
    assert [plan(tracks, seed=seed) for seed in range(5)] == [None] * 5
    assert plan([track(120), Beats((), (), 30.0)], tempo_width=None) is None
    assert plan(tracks, align="beat").partner_start in beats_only.beats
    from_start = plan([Beats((), (), 30.0)] * 2, no_beats="from_start")
    assert (from_start.start, from_start.partner_start, from_start.seconds) == (0.0, 0.0, WINDOW)


def test_tracks_too_short_behind_their_downbeats_are_not_mixed():
    short = Beats((4.0, 5.0), (4.0,), 6.0)
    assert plan([track(120), short], tempo_width=None) is None
    assert plan([track(120), short], tempo_width=None, min_overlap=2.0) is not None
    assert plan([track(120), short], tempo_width=None, window=1.5) is not None  # a whole item remains


def test_the_last_downbeat_begins_a_mix_only_where_that_is_wanted():
    tracks = [Beats((0.0, 1.0, 2.0), (0.0, 2.0), 30.0)] * 2
    starts = {plan(tracks, seed=s).start for s in range(30)}
    upstream = {plan(tracks, seed=s, last_downbeat=False).start for s in range(30)}
    assert starts == {0.0, 2.0} and upstream == {0.0}


def test_a_random_crop_moves_both_starts_alike():
    tracks = [track(120, 60.0), track(120, 60.0)]
    for seed in range(20):
        first, later = plan(tracks, seed=seed), plan(tracks, seed=seed, crop="random")
        assert later.start - first.start == pytest.approx(later.partner_start - first.partner_start)
        assert later.start + later.seconds <= 60.0 + 1e-9 and later.ratio == first.ratio
    assert any(plan(tracks, seed=s, crop="random").start > plan(tracks, seed=s).start + 1 for s in range(20))


def test_without_alignment_any_two_are_cut_anywhere():
    tracks = [Beats((), (), 30.0), Beats((), (), 4.0)]
    mixes = [plan(tracks, seed=s, align="none", tempo_width=None) for s in range(20)]
    assert all(mix.partner_start == 0.0 and mix.seconds == 4.0 for mix in mixes)
    assert len({mix.start for mix in mixes}) == 20


def test_the_share_of_mixes_and_the_spread_of_lambda_are_as_stated():
    tracks = [track(120), track(120)]
    mixes = [plan(tracks, seed=s, prob=0.3) for s in range(1000)]
    ratios = np.array([mix.ratio for mix in mixes if mix])
    assert len(ratios) == pytest.approx(300, abs=50)
    assert ratios.mean() == pytest.approx(0.5, abs=0.03) and ratios.std() == pytest.approx(0.151, abs=0.02)
    assert not any(plan(tracks, seed=s, prob=0.0) for s in range(50))


def test_lambda_one_is_the_anchor():
    anchor, partner = np.random.default_rng(0).standard_normal((2, 50)).astype(np.float32)
    assert np.array_equal(mix_waveforms(anchor, partner, 1.0), anchor)
    assert np.array_equal(mix_waveforms(anchor, partner[:30], 0.0), partner[:30])
    posterior, other = (torch.rand(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0)) for _ in "12")
    mean, std = mix_posteriors(tuple(posterior), tuple(other + 1), torch.ones(3), toys.mixup())
    assert torch.equal(mean, posterior[0]) and torch.equal(std, posterior[1])


def test_a_mix_of_identical_latents_is_that_latent():
    mean, std = torch.randn(2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    ratio = torch.tensor([0.2, 0.5, 0.9])
    mixed = mix_posteriors((mean, std.abs()), (mean, std.abs()), ratio, toys.mixup(latent="mean"))
    assert (mixed[0] - mean).abs().max() < 1e-6 and not mixed[1].any()


def test_a_sample_of_the_mixed_posterior_is_distributed_as_a_mix_of_samples():
    mean1, std1, mean2, std2 = (torch.full((1, 1, 1, 1), value) for value in (1.0, 0.5, -2.0, 1.5))
    mean, std = mix_posteriors((mean1, std1), (mean2, std2), torch.tensor([0.3]), toys.mixup())
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(2, 200_000, generator=generator)
    samples = 0.3 * (1.0 + 0.5 * draws[0]) + 0.7 * (-2.0 + 1.5 * draws[1])
    assert mean.item() == pytest.approx(samples.mean().item(), abs=0.01)
    assert std.item() == pytest.approx(samples.std().item(), abs=0.01)


def test_unit_renorm_gives_mixed_latents_their_deviation_back():
    parents = torch.randn(2, 50, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    zeros, ratio = torch.zeros_like(parents[0]), torch.full((50,), 0.4)
    shrunk, whole = (
        mix_posteriors((parents[0], zeros), (parents[1], zeros), ratio, toys.mixup(renorm=renorm))[0].std()
        for renorm in ("none", "unit")
    )
    assert shrunk.item() == pytest.approx(math.hypot(0.4, 0.6), abs=0.02)
    assert whole.item() == pytest.approx(1.0, abs=0.02)


def test_captions_of_mixes():
    for text, expected in (
        ("anchor", "a bell"),
        ("interpolate", "a bell"),
        ("louder", "a dog"),
        ("both", "a bell and a dog"),
    ):
        assert mix_caption(toys.mixup(text=text), "a bell", "a dog", 0.4) == expected
    assert mix_caption(toys.mixup(text="louder"), "a bell", "a dog", 0.6) == "a bell"
    assert mix_caption(toys.mixup(text="both"), "a bell", "a bell", 0.4) == "a bell"


def test_the_silent_tail_is_a_tenth():
    waveform = silence_tail(torch.ones(2, 163840))
    assert (waveform != 0).sum(dim=1).tolist() == [147456, 147456] and not waveform[:, 147456:].any()


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"space": "mel"}, r"mixup\.space='mel': expected audio or latent"),
        ({"prob": 1.5}, r"mixup\.prob=1\.5: expected 0 to 1"),
        ({"alpha": 0.0}, r"mixup\.alpha=0\.0"),
        ({"tempo_width": 0}, r"mixup\.tempo_width=0"),
        ({"min_overlap": -1.0}, r"mixup\.min_overlap=-1\.0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, told):
    with pytest.raises(InputError, match=told):
        toys.mixup(**changes)
