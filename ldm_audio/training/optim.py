"""Learning-rate schedules: plain functions of the step, so that nothing about them needs saving."""

import math


def constant(step: int) -> float:
    """Factor 1 at every step."""
    return 1.0


def warmup(step: int, *, warmup_steps: int) -> float:
    """Linear from 1 / warmup_steps to 1 over the first `warmup_steps` steps, then 1."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def warmup_cosine(step: int, *, warmup_steps: int, max_steps: int, floor: float) -> float:
    """Linear warm-up, then half a cosine from 1 down to `floor` at `max_steps`."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = min(1.0, (step - warmup_steps) / max(1, max_steps - warmup_steps))
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))


def exponential(step: int, *, decay: float, every: int) -> float:
    """`decay` once every `every` steps; HiFi-GAN's is 0.999 once an epoch."""
    return decay ** (step // every)
