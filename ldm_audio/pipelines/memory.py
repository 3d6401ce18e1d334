"""How much memory a call takes at its peak, and what glibc keeps or gives back of what was freed."""

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from ldm_audio.errors import InputError

PROCESS = Path("/proc/self")
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # glibc's names of what `mallopt` sets


def give_back_memory() -> None:
    """Lets the system have what glibc keeps of freed memory: pieces that the next network's maps do not fit.

    After the UNet and the VAE of AudioLDM-S these are 100 MB, which would stand in the peak of the vocoder.
    """
    trim = glibc("malloc_trim")
    if trim is not None:
        trim(0)


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed from here on, for the next of its size; of other systems nothing changes.

    Without it every map from 32 MB on is asked of the system anew and its pages are zeroed anew: a fifth of
    the time of a vocoder's training step on the CPU. For work whose maps have the same sizes in each step:
    where they vary, what is kept does not fit, and the peak of memory is higher.
    """
    mallopt = glibc("mallopt")
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def glibc(name: str) -> Callable[..., int] | None:
    """That function of the C library; None where it has none of this name."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def peak_growth(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that `call` takes at its peak beyond what was taken before: on a GPU of torch's memory, on the
    CPU of the whole process.

    Raises InputError on other devices, and on systems that do not tell a process its peak.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    if device.type != "cpu" or not (PROCESS / "clear_refs").exists():
        raise InputError("memory_limit: peaks of memory can be measured on CUDA and on Linux's CPU only")
    give_back_memory()
    (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def resident(name: str) -> int:
    """Bytes of a line in Linux's status of this process."""
    line = next(line for line in (PROCESS / "status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024
