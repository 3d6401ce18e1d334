"""Text-audio retrieval (CLAP, 2211.06687, section 4.1): given one side of a pair, where does the other rank?

Axes: n pairs.
"""

import torch
from torch import Tensor

from ldm_audio.errors import InputError

KS = (1, 5, 10)


def ranks(similarity: Tensor) -> Tensor:
    """(n, n) similarity, row query, column candidate -> (n, n) int64 rank of each candidate, 0 the best.

    Equally similar candidates share their mean place, rounded up, so that a constant tower gains nothing.
    """
    above = (similarity[:, None, :] > similarity[:, :, None]).sum(-1)
    equal = (similarity[:, None, :] == similarity[:, :, None]).sum(-1) - 1
    return above + (equal + 1) // 2


def retrieval(audio_embed: Tensor, text_embed: Tensor, *, permutations: int, seed: int) -> dict[str, float]:
    """(n, d) and (n, d) unit-length embeddings of n pairs -> recall at 1, 5 and 10 both ways, the median rank
    (1 the best) and `p`: among random re-pairings the share whose mean rank is as good as the real one,
    the real one counted in. InputError for fewer than two pairs.
    """
    if len(audio_embed) < 2 or len(audio_embed) != len(text_embed):
        raise InputError(
            f"{len(audio_embed)} audio and {len(text_embed)} text embeddings: expected at least 2 pairs"
        )
    similarity = audio_embed @ text_embed.T
    by_audio, by_text = ranks(similarity), ranks(similarity.T)
    results = {}
    for name, of_pair in (("text_of_audio", by_audio.diagonal()), ("audio_of_text", by_text.diagonal())):
        results |= {f"{name}/recall_at_{k}": (of_pair < k).double().mean().item() for k in KS}
        results[f"{name}/median_rank"] = 1 + of_pair.double().median().item()

    both = by_audio + by_text.T  # (n audio, n text)
    rows = torch.arange(len(both))
    generator = torch.Generator().manual_seed(seed)
    as_good = sum(
        int(both[rows, torch.randperm(len(both), generator=generator)].sum() <= both.trace())
        for _ in range(permutations)
    )
    return results | {"p": (1 + as_good) / (1 + permutations)}
