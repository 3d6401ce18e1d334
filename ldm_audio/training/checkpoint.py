"""Training state on disk: written to a temporary name, then renamed, so that the last one is always whole."""

from pathlib import Path

import torch

from ldm_audio.errors import InputError
from ldm_audio.files import replacing


def save_checkpoint(path: Path, state: dict) -> None:
    """Writes `state` (tensors and plain values) so that `path` is either the old one or the new one."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_checkpoint(path: Path) -> dict:
    """Reads what `save_checkpoint` wrote, tensors and plain values only; InputError if it is not readable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a readable checkpoint ({reason}); remove it to start afresh"
        ) from error
