"""Novelty: the nearest training sound, and the shares above the paper's thresholds."""

import pytest
import torch

from ldm_audio.evaluation.novelty import nearest_similarity, novelty


def test_the_nearest_neighbour_is_found_over_all_chunks_whatever_the_lengths_of_the_vectors():
    generator = torch.Generator().manual_seed(0)
    made, training = torch.randn(5, 8, generator=generator), torch.randn(30, 8, generator=generator)
    training[17] = 3.0 * made[2]
    found = nearest_similarity(made, training.split(7))
    every = torch.nn.functional.cosine_similarity(made[:, None], training[None], dim=2)
    assert torch.allclose(found, every.amax(dim=1), atol=1e-6)
    assert found[2].item() == pytest.approx(1.0)


def test_shares_exceed_their_thresholds_strictly():
    found = novelty(torch.tensor([0.5, 0.91, 0.96, 1.0], dtype=torch.float64))
    assert (found["sim_aa@90"], found["sim_aa@95"]) == (0.75, 0.5)
    at_threshold = novelty(torch.tensor([0.90, 0.95], dtype=torch.float64))
    assert (at_threshold["sim_aa@90"], at_threshold["sim_aa@95"]) == (0.5, 0.0)
