"""One thread in every test, so that sums come out the same, and the entry points run in this process."""

import runpy
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import ldm_audio

CHECKOUT = Path(ldm_audio.__file__).parents[1]


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


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
