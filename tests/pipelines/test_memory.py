"""What a call takes at its peak, and what is kept of freed memory."""

import platform
import subprocess
import sys

import pytest
import torch

from ldm_audio.errors import InputError
from ldm_audio.pipelines.memory import peak_growth

MEBI = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="told by Linux alone")
@pytest.mark.parametrize("mebibytes", [64, 256])
def test_the_peak_counts_what_was_freed_before_the_end(mebibytes):
    def call():
        torch.zeros(mebibytes * MEBI, dtype=torch.uint8).add_(1)

    for _ in range(2):  # an earlier peak does not count again
        assert peak_growth(call, torch.device("cpu")) == pytest.approx(mebibytes * MEBI, rel=0.1)


def test_a_device_that_tells_no_peak_is_named():
    with pytest.raises(InputError, match=r"memory_limit: .*CUDA and on Linux"):
        peak_growth(lambda: None, torch.device("meta"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators are left as they are")
def test_memory_kept_is_hardly_asked_of_the_system_again():
    code = """
import resource, torch
from ldm_audio.pipelines.memory import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(30):
        torch.empty(48 * 2**20, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
plain = faults()
keep_freed_memory()
print(plain, faults())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    plain, kept = map(int, done.stdout.split())
    assert kept < plain / 3
