"""One thread in every test, so that sums come out the same, and the entry points run in this process."""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Callable
from multiprocessing.context import BaseContext
from pathlib import Path

import pytest

import ldm_audio

CHECKOUT = Path(ldm_audio.__file__).parents[1]
WHAT_TRAINING_IMPORTS_LATE = (
    "torch._dynamo",
    "matplotlib.backends.backend_agg",
    "matplotlib.figure",
    "tokenizers",
)


def pytest_configure():
    """Before torch is imported, here and in every process that pytest or a test starts."""
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch  # not above: the process that only hands out tests does without

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processes() -> BaseContext:
    """Starts processes that have imported everything and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crashes", "ranks", *WHAT_TRAINING_IMPORTS_LATE])
    return context


@pytest.fixture(scope="session")
def command() -> Callable[..., int]:
    """`command("train.py", "key=value", ...)` runs an entry point in this process; returns its exit code."""

    def run(script: str, *arguments: object) -> int:
        previous, sys.argv = sys.argv, [script, *map(str, arguments)]
        try:
            if script.endswith(".py"):
                runpy.run_path(str(CHECKOUT / script), run_name="__main__")
            else:
                runpy.run_module(script, run_name="__main__")
        except SystemExit as done:
            return done.code or 0
        finally:
            sys.argv = previous
        return 0

    return run
