"""Retrieval: ranks as by sorting, and a p-value that tells pairs from strangers."""

import pytest
import torch

from ldm_audio.errors import InputError
from ldm_audio.evaluation.retrieval import ranks, retrieval


def unit(*shape, seed):
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def test_ranks_are_places_in_the_sorted_row():
    similarity = torch.randn(7, 7, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ranks(similarity), similarity.argsort(1, descending=True).argsort(1))


def test_equal_candidates_share_the_middle_place():
    assert ranks(torch.zeros(5, 5)).eq(2).all()


def test_true_pairs_are_found_and_significant():
    audio = unit(25, 16, seed=1)
    found = retrieval(audio, audio, permutations=999, seed=0)
    assert found["text_of_audio/recall_at_1"] == found["audio_of_text/recall_at_1"] == 1
    assert found["audio_of_text/median_rank"] == 1
    assert found["p"] == 1 / 1000


def test_strangers_are_rarely_significant():
    ps = [
        retrieval(unit(12, 8, seed=s), unit(12, 8, seed=99 + s), permutations=199, seed=0)["p"]
        for s in range(40)
    ]
    assert sum(p <= 0.05 for p in ps) <= 7  # 2 expected
    assert 0.3 < sum(ps) / len(ps) < 0.7


def test_a_single_pair_is_refused():
    with pytest.raises(InputError, match="at least 2 pairs"):
        retrieval(unit(1, 4, seed=0), unit(1, 4, seed=0), permutations=9, seed=0)
