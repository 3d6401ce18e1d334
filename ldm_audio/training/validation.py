"""What is measured and shown of an objective between two training steps."""

from collections.abc import Iterable

import torch

from ldm_audio import distributed
from ldm_audio.objectives.base import Objective, Preview
from ldm_audio.training.stopping import Interrupted, StopSignal


@torch.no_grad()
def validate(
    objective: Objective, batches: Iterable[dict], stop: StopSignal
) -> tuple[dict[str, float], dict[str, Preview]]:
    """`val/` means over the items of all ranks, and the previews of the first batch.

    The objective is in eval mode with the weights to be judged. Items numbered below 0, which fill up a
    rank's share, are not counted. Raises Interrupted after a signal.
    """
    sums: dict[str, float] = {}
    count, first = 0, None
    for batch in batches:
        first = first or batch
        rows = int((batch["item"] >= 0).sum())
        for key, value in objective.validate(batch).items():
            sums[key] = sums.get(key, 0.0) + float(value) * rows
        count += rows
        if stop.has_come():
            raise Interrupted
    averages = torch.tensor([*sums.values(), count], dtype=torch.float64)
    *totals, count = distributed.mean_over_ranks(averages).tolist()
    metrics = {f"val/{key}": value / count for key, value in zip(sums, totals)}
    previews = preview(objective, first, stop) if first else {}
    if stop.has_come():
        raise Interrupted
    return metrics, previews


def preview(objective: Objective, batch: dict, stop: StopSignal) -> dict[str, Preview]:
    """Float32 previews on the CPU; none after a signal.

    They are made by the main process, and where networks are split by all: only there a signal waits.
    """
    needs_all = distributed.is_sharded(objective.children())
    if not (distributed.is_main() or needs_all):
        return {}
    try:
        with stop.interrupting(not needs_all):
            previews = objective.preview(batch)
    except Interrupted:
        return {}
    return {name: detached(shown) for name, shown in previews.items()}


def detached(shown: Preview) -> Preview:
    """The same preview in float32 on the CPU."""
    waveform = shown.waveform.detach().float().cpu() if shown.waveform is not None else None
    return Preview(shown.mel.detach().float().cpu(), waveform, shown.sample_rate)
