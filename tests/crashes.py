"""Ends a training run of its own process at a chosen place, as a machine, a scheduler or a full disk does."""

import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import toys
from runs import VALIDATION, objective, trainer

from ldm_audio.errors import RunError
from ldm_audio.objectives.base import Objective
from ldm_audio.training import checkpoint

SETTINGS = {"max_steps": 7, "validate_every": 2, "save_every": 3}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def on_call(number: int, act: Callable[[], None], function: Callable) -> Callable:
    """`function`, which does something else first when it is called for the `number`-th time."""
    calls = 0

    def counting(*arguments, **settings):
        nonlocal calls
        calls += 1
        if calls == number:
            act()
        return function(*arguments, **settings)

    return counting


def in_a_step(made: Objective) -> None:
    """In the fifth step, after the first of its players has moved, where there are two."""
    losses = made.losses

    def interrupted(batch, step):
        for turn in losses(batch, step):
            yield turn
            if step == 4:
                kill()

    made.losses = interrupted


def in_a_checkpoint(made: Objective) -> None:
    """While half of the second one is written."""
    save = torch.save

    def half(state, file):
        if state["step"] == 6:
            save(state, file)
            file.truncate(file.tell() // 2)
            kill()
        save(state, file)

    torch.save = half


def in_a_validation(made: Objective) -> None:
    made.validate = on_call(2, kill, made.validate)


def in_a_weights_file(made: Objective) -> None:
    made.weights = on_call(3, kill, made.weights)


def terminated_in_a_validation(made: Objective) -> None:
    made.validate = on_call(2, terminate, made.validate)


def terminated_in_a_preview(made: Objective) -> None:
    made.preview = on_call(2, terminate, made.preview)


def on_a_full_disk(made: Objective) -> None:
    """Files cannot become larger than a few metrics from the fifth step on."""

    def fill() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8000, resource.RLIM_INFINITY))

    made.losses = on_call(5, fill, made.losses)


PLACES: dict[str, tuple[Callable[[Objective], None], int]] = {
    "step": (in_a_step, -signal.SIGKILL),
    "checkpoint": (in_a_checkpoint, -signal.SIGKILL),
    "validation": (in_a_validation, -signal.SIGKILL),
    "weights": (in_a_weights_file, -signal.SIGKILL),
    "validation_terminated": (terminated_in_a_validation, 128 + signal.SIGTERM),
    "preview_terminated": (terminated_in_a_preview, 128 + signal.SIGTERM),
    "full_disk": (on_a_full_disk, 1),
}
"""Where a run ends, and the exit code of its process."""


def train(folder: Path, name: str, place: str | None) -> None:
    """Trains an objective, or continues, and ends there; `folder`.txt holds what an entry point would say."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    made = objective(name)
    if place is not None:
        PLACES[place][0](made)
    try:
        trainer(folder, **SETTINGS).fit(made, toys.Batches(2), VALIDATION)
    except RunError as error:
        folder.with_suffix(".txt").write_text(str(error))
        sys.exit(1)


assert checkpoint.torch is torch  # whose `save` is replaced above
