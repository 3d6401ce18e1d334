"""What the speech objectives promise beside what every objective does."""

import math

import pytest
import torch
import toys
from torch.nn import functional as F

from ldm_audio.errors import InputError
from ldm_audio.objectives.clvp import leave_out
from ldm_audio.objectives.dvae import perplexity
from ldm_audio.objectives.speech import speech_tokens
from ldm_audio.randomness import RowRandom, generator_for

RECORDED = 1280  # samples of the second recording of a padded batch
HOP, HALF_WINDOW = toys.SPEECH_MEL["hop_length"], toys.SPEECH_MEL["n_fft"] // 2


def padded_batch(longest: int = toys.SAMPLES) -> dict:
    """Two recordings, the second shorter, with silence behind them up to `longest` samples."""
    batch = toys.batch(0, 1)
    batch["num_samples"] = torch.tensor([toys.SAMPLES, RECORDED])
    batch["waveform"] = F.pad(batch["waveform"], (0, longest - toys.SAMPLES))
    batch["waveform"][1, RECORDED:] = 0.0
    return batch


def loud_from(start: int, quiet: dict) -> dict:
    """The same batch with noise behind its second recording, from sample `start` on."""
    noise = torch.rand(quiet["waveform"].shape[1] - start, generator=generator_for(0))
    waveform = quiet["waveform"].clone()
    waveform[1, start:] = 2 * noise - 1
    assert not torch.equal(waveform, quiet["waveform"])
    return quiet | {"waveform": waveform}


def end_of_what_a_token_hears(token: int) -> int:
    """The first sample that neither the encoder's block, its stride nor the window brings to a token."""
    frame = 2 * (token + 2) + 1  # two convolutions of width 3, then one of stride 2
    return frame * HOP + HALF_WINDOW


def end_of_gradient(value: torch.Tensor, waveform: torch.Tensor) -> int:
    """The first sample of the second recording behind all that `value` depends on."""
    (gradient,) = torch.autograd.grad(value, waveform)
    return int(gradient[1].nonzero().max()) + 1


def test_what_pads_a_recording_teaches_the_dvae_nothing():
    objective = toys.objective("dvae").eval()
    frame = RECORDED // HOP  # the last that counts
    token = (frame + 1) // 2 + 2  # behind the enlargement a convolution of width 3, two before it
    end = end_of_what_a_token_hears(token)
    quiet = padded_batch(end + 2 * HOP)
    loud = loud_from(end, quiet)
    one, other = (objective.validate(batch) for batch in (quiet, loud))
    assert all(torch.equal(one[key], other[key]) for key in one)
    noise = loud_from(0, quiet)
    noise["waveform"].requires_grad_()
    assert end_of_gradient(objective.validate(noise)["reconstruction"], noise["waveform"]) == end


def test_the_codebook_follows_what_the_trainer_let_pass():
    objective = toys.objective("dvae").train()
    before = objective.dvae.codebook.vectors.clone()
    turns = objective.losses(toys.batch(0, 1), 0)
    next(turns)
    assert torch.equal(before, objective.dvae.codebook.vectors)  # a step that is skipped moves nothing
    assert next(turns, None) is None
    assert not torch.equal(before, objective.dvae.codebook.vectors)
    assert "dvae.codebook.sums" in objective.learned_state()


def test_a_new_codebook_begins_at_what_the_encoder_says():
    objective = toys.objective("dvae")
    batches = [toys.batch(0, 1, 2), toys.batch(3, 4)]
    objective.prepare(batches)
    z = torch.cat([objective.dvae.encode(objective.mel(b["waveform"])).z.transpose(1, 2).flatten(0, 1)
                   for b in batches])  # fmt: skip
    distance = (objective.dvae.codebook.vectors[:, None] - z).norm(dim=-1).min(dim=1).values
    assert distance.max() < 1e-4
    trained = toys.objective("dvae")
    trained.dvae.provenance = {"run": "earlier"}
    before = trained.dvae.codebook.vectors.clone()
    trained.prepare(batches)
    assert torch.equal(before, trained.dvae.codebook.vectors)


def test_vectors_that_nothing_chooses_begin_anew():
    objective = toys.objective("dvae", restart_below=0.5).train()
    objective.dvae.codebook.vectors[3:] = 1000.0
    objective.dvae.codebook.counts.zero_()
    list(objective.losses(toys.batch(0, 1, 2), 0))
    assert objective.dvae.codebook.vectors.abs().max() < 100
    kept = toys.objective("dvae", restart_below=0.0).train()
    kept.dvae.codebook.start_at(torch.full((12, 4), 1000.0))
    list(kept.losses(toys.batch(0, 1, 2), 0))
    assert kept.dvae.codebook.vectors.max() > 900


def test_perplexity_counts_the_tokens_in_use():
    assert perplexity(torch.tensor([0.0, 3.0, 0.0])).item() == pytest.approx(1.0)
    assert perplexity(torch.ones(12)).item() == pytest.approx(12.0, rel=1e-5)


def test_tokens_end_one_behind_the_recording():
    objective = toys.objective("speech_lm")
    tokens, mask = speech_tokens(padded_batch(), objective.mel, objective.dvae)
    assert mask.sum(1).tolist() == [toys.SAMPLES // 320 + 1, RECORDED // 320 + 1]
    assert tokens.shape == mask.shape
    short = toys.batch(0, 1)
    short["num_samples"] = torch.tensor([640, 320])
    assert speech_tokens(short, objective.mel, objective.dvae)[0].shape[1] == 3


def test_the_loss_of_the_speech_model_is_written_out():
    objective = toys.objective("speech_lm").eval()
    lm, batch = toys.randomise(objective.speech_lm), padded_batch()
    tokens, mask = speech_tokens(batch, objective.mel, objective.dvae)
    text, text_mask = objective.tokenizer(batch["caption"])
    speech_rows, text_rows = [], []
    for i in range(2):  # each row as the original builds it
        codes = tokens[i].tolist()
        codes = [c if kept else 13 for c, kept in zip(codes, mask[i].tolist())]
        speech_rows.append(([12, *codes, 13], [*codes, 13, 13]))
        ids = text[i].tolist()
        assert all(token == 0 for token, kept in zip(ids, text_mask[i].tolist()) if not kept)
        text_rows.append(([63, *ids, 0], [*ids, 0, 0]))
    inputs, targets = (torch.tensor([row[k] for row in speech_rows]) for k in (0, 1))
    text_inputs, text_targets = (torch.tensor([row[k] for row in text_rows]) for k in (0, 1))
    clips = [torch.stack([lm.conditioning(objective.mel(r))[0] for r in row[:, None]]).mean(0)
             for row in batch["references"]]  # fmt: skip
    logits = lm(torch.stack(clips), text_inputs, inputs)
    speech = F.cross_entropy(logits.speech.flatten(0, 1), targets.flatten())
    texts = F.cross_entropy(logits.text.flatten(0, 1), text_targets.flatten())
    terms = objective.terms(batch, across_ranks=False)
    assert torch.allclose(terms["speech"], speech, atol=1e-5)
    assert torch.allclose(terms["text"], texts, atol=1e-5)
    assert torch.allclose(terms["loss"], speech + 0.5 * texts, atol=1e-5)


def test_a_model_without_a_text_head_learns_speech_alone():
    recipe = {**toys.SPEECH_LM_RECIPE, "text_head": False}
    objective = toys.objective("speech_lm", speech_lm=toys.SpeechLM(**toys.arguments(recipe)))
    assert objective.terms(toys.batch(0, 1), across_ranks=False).keys() == {"loss", "speech", "accuracy"}


def test_clvp_hears_no_padding():
    objective = toys.objective("clvp").eval()
    toys.randomise(objective.clvp)
    last = RECORDED // (2 * HOP)  # the last token that counts: one behind the whole ones
    end = end_of_what_a_token_hears(last)
    quiet = padded_batch()
    loud = loud_from(end, quiet)
    tokens = [objective.dvae.encode(objective.mel(batch["waveform"])).tokens for batch in (quiet, loud)]
    assert not torch.equal(*tokens)  # there is something not to hear
    assert torch.equal(objective.validate(quiet)["loss"], objective.validate(loud)["loss"])
    noise = loud_from(0, quiet)["waveform"].requires_grad_()
    heard = objective.dvae.encode(objective.mel(noise)).z[1, :, last].sum()
    assert end_of_gradient(heard, noise) == end
    longer = {**quiet, "caption": [quiet["caption"][0], "a bell"]}
    alone = {key: value[1:] for key, value in longer.items()}
    text, mask = objective.tokenizer(longer["caption"])
    single, _ = objective.tokenizer(alone["caption"])
    whole = objective.clvp.embed_text(F.pad(text, (0, 1)), F.pad(mask, (1, 0), value=True))
    assert torch.allclose(whole[1:], objective.clvp.embed_text(F.pad(single, (0, 1))), atol=1e-5)


def test_tokens_are_left_out_by_row_and_never_all_of_them():
    mask = torch.ones(400, 5, dtype=torch.bool)
    mask[0, 1:] = False
    keys = [(0, i) for i in range(400)]
    kept = leave_out(mask, 0.6, RowRandom(keys))
    assert kept.any(dim=1).all() and not (kept & ~mask).any()
    share = kept[1:].float().mean().item()
    assert abs(share - (0.4 + 0.6**5)) < 0.05  # a row that would be left out whole stays whole
    assert torch.equal(leave_out(mask[7:8], 0.6, RowRandom(keys[7:8])), kept[7:8])
    assert torch.equal(leave_out(mask, 0.0, RowRandom(keys)), mask)


def test_masking_in_training_depends_on_step_and_item_and_leaves_validation_alone():
    objective = toys.objective("clvp", speech_masking=0.6).train()
    toys.randomise(objective.clvp)
    losses = [next(objective.losses(toys.batch(0, 1, 2), step))[1].item() for step in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert all(math.isfinite(loss) for loss in losses)


def test_parts_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match="the dvae makes 13 speech tokens, speech_lm has 12"):
        toys.objective("speech_lm", dvae=toys.DVAE(**toys.arguments({**toys.DVAE_RECIPE, "num_tokens": 13})))
    with pytest.raises(InputError, match="the dvae makes 65 speech tokens, clvp knows 64"):
        toys.objective("clvp", dvae=toys.DVAE(**toys.arguments({**toys.DVAE_RECIPE, "num_tokens": 65})))
    with pytest.raises(InputError, match=r"text_masking=1\.0: expected 0 to less than 1"):
        toys.objective("clvp", text_masking=1.0)
    with pytest.raises(InputError, match="dvae is frozen here but has no weights"):
        toys.objective("clvp", allow_random_frozen=False)
