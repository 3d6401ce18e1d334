"""Torch's own files, opened without running anything that they contain.

A pickle can name any function to be called while it is read. `weights_only=True` refuses all but tensors and
plain containers; beyond that only the types below are let through, by name.
"""

import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ldm_audio.convert.rules import few
from ldm_audio.errors import InputError

NUMPY_SCALAR = np.float64(0).__reduce__()[0]  # what unpickles one; its module has no public name

# LAION's optimiser state holds numpy scalars (its learning rate is a cosine of numpy's). The module was
# renamed in numpy 2, and files of both kinds are about.
ALLOWED = [
    np.dtype,
    (NUMPY_SCALAR, "numpy.core.multiarray.scalar"),
    (NUMPY_SCALAR, "numpy._core.multiarray.scalar"),
    *(type(np.dtype(kind)) for kind in ("f2", "f4", "f8", "i4", "i8", "u1", "?")),
]


def read_pickle(path: Path) -> object:
    """What a `.ckpt`, `.pt`, `.pth` or `.bin` file holds; its tensors stay on disk until they are used.

    Files in the format from before torch 1.6 are read as a whole.

    Raises:
        InputError: the file is damaged, no torch file, or asks for more than tensors, plain values and
            `ALLOWED`; then it says for what.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such weights file")
    is_zip = zipfile.is_zipfile(path)
    try:
        with safe_globals(ALLOWED):
            asked = get_unsafe_globals_in_checkpoint(path) if is_zip else []
            if asked:
                raise InputError(f"{path}: refused, it asks for {few(sorted(asked))}, which may run code")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip or None)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path}: refused or not a torch file ({reason(error)})") from error
    except InputError:
        raise
    except Exception as error:  # of a damaged file: of any kind
        raise InputError(f"{path}: not a readable torch file ({reason(error)})") from error


def reason(error: Exception) -> str:
    """The line of torch's long message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if "unsupported" in line.lower()]
    return (telling or lines or [type(error).__name__])[0]
