"""How much of what was generated is in the training set already (MusicLDM, arXiv 2308.01546, section 4).

For each sound the similarity to its nearest neighbour in the training set, both by CLAP's audio embedding;
the share of sounds above 0.90 and above 0.95 is the paper's SIM_AA@90 and @95. Less is more novel.

Axes: g generated sounds, t training sounds, d width.
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = (0.90, 0.95)


def nearest_similarity(generated: Tensor, training: Iterable[Tensor]) -> Tensor:
    """(g, d) embeddings and chunks (t, d) of the training set's -> (g,) largest cosine similarities."""
    generated = F.normalize(generated.float(), dim=1)
    best = generated.new_full((len(generated),), -1.0)
    for chunk in training:
        best = torch.maximum(best, (generated @ F.normalize(chunk.float(), dim=1).T).amax(dim=1))
    return best


def novelty(similarity: Tensor) -> dict[str, float]:
    """Mean of (g,) nearest similarities and the share above each threshold."""
    shares = {f"sim_aa@{round(100 * t)}": (similarity > t).float().mean().item() for t in THRESHOLDS}
    return {"sim_mean": similarity.mean().item(), **shares}
