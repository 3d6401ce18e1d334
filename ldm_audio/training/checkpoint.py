"""Training state on disk: written to a temporary name, then renamed, so that the last one is always whole."""

import os
from pathlib import Path

import torch

from ldm_audio.errors import InputError


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` (tensors and plain values) so that `path` is either the old or the new one, never half."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_checkpoint(path: Path) -> dict:
    """Reads what `save_checkpoint` wrote, tensors and plain values only; InputError if it is not readable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path}: not a readable checkpoint ({reason}); remove it to start afresh") from error
