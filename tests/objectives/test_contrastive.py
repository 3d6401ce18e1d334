"""InfoNCE against a hand computation."""

import math

import pytest
import torch
import toys
from torch import nn

from ldm_audio.objectives.contrastive import ContrastiveObjective, equal_captions

AUDIO = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
TEXT = torch.tensor([[0.8, 0.6], [1.0, 0.0], [-1.0, 0.0]])


class Given(nn.Module):
    """A CLAP with given embeddings."""

    def __init__(self, audio, text, scale):
        super().__init__()
        self.audio, self.text = audio, text
        self.logit_scale_audio = nn.Parameter(torch.tensor(math.log(scale)))
        self.logit_scale_text = nn.Parameter(torch.tensor(0.0))

    def forward(self, waveform, text_tokens, text_mask):
        return self.audio, self.text


def loss_of(audio, text, captions, *, scale=3.0, mask_duplicates=True) -> tuple[float, float]:
    objective = ContrastiveObjective(
        clap=Given(audio, text, scale), tokenizer=toys.tokenizer(), mask_duplicates=mask_duplicates
    )
    batch = {"waveform": torch.zeros(len(captions), 8), "caption": captions}
    ((_, loss, logs),) = objective.losses(batch, 0)
    assert logs["logit_scale"].item() == pytest.approx(scale)
    return loss.item(), logs["accuracy"].item()


def by_hand(left_out: set[tuple[int, int]]) -> float:
    """Equation 1 in plain Python; pairs left out are in no denominator."""
    pairs = [(i, j) for i in range(3) for j in range(3)]
    logits = {(i, j): 3.0 * sum(AUDIO[i, k].item() * TEXT[j, k].item() for k in (0, 1)) for i, j in pairs}
    total = 0.0
    for i in range(3):
        row = sum(math.exp(logits[i, j]) for j in range(3) if (i, j) not in left_out)
        column = sum(math.exp(logits[j, i]) for j in range(3) if (j, i) not in left_out)
        total += 0.5 * (math.log(row) + math.log(column)) - logits[i, i]
    return total / 3


def test_the_loss_is_the_symmetric_cross_entropy():
    loss, accuracy = loss_of(AUDIO, TEXT, ["a", "b", "c"])
    assert loss == pytest.approx(by_hand(set()), rel=1e-5)
    assert accuracy == pytest.approx((0 + 1 / 3) / 2)  # only the last text is nearest to its own audio


def test_audio_and_text_may_change_places():
    captions = ["a", "b", "c"]
    assert loss_of(AUDIO, TEXT, captions)[0] == pytest.approx(loss_of(TEXT, AUDIO, captions)[0], rel=1e-6)


def test_equal_captions_are_no_negatives_of_each_other():
    loss, _ = loss_of(AUDIO, TEXT, ["a", "a", "b"])
    assert loss == pytest.approx(by_hand({(0, 1), (1, 0)}), rel=1e-5)
    unmasked, _ = loss_of(AUDIO, TEXT, ["a", "a", "b"], mask_duplicates=False)
    assert unmasked == pytest.approx(by_hand(set()), rel=1e-5)


def test_only_other_rows_count_as_equal():
    expected = [[0, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert equal_captions(["x", "y", "x", ""]).int().tolist() == expected


@pytest.mark.parametrize("scale, kept", [(1e4, 100.0), (0.01, 1.0), (7.0, 7.0)])
def test_the_scale_stays_between_1_and_100(scale, kept):
    objective = toys.objective("contrastive")
    objective.clap.logit_scale_audio.data.fill_(math.log(scale))
    ((_, _, logs),) = objective.losses(toys.batch(0, 1), 0)
    assert logs["logit_scale"].item() == pytest.approx(kept, rel=1e-5)


def test_the_texts_own_scale_does_not_learn_but_is_kept():
    objective = toys.objective("contrastive")
    assert not objective.clap.logit_scale_text.requires_grad
    assert "clap.logit_scale_text" in objective.learned_state()
