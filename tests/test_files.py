"""Folders that one process at a time works in."""

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from ldm_audio.errors import InputError
from ldm_audio.files import only_one_in


def hold(folder: Path, told: Connection) -> None:
    """Works in a folder until it is killed, beside a child as a data worker is one."""
    with only_one_in(folder):
        child = multiprocessing.get_context("fork").Process(target=signal.pause)
        child.start()
        told.send(child.pid)
        signal.pause()


def test_a_second_process_is_refused_until_the_first_has_ended_even_by_kill(tmp_path):
    context = multiprocessing.get_context("spawn")
    told, tell = context.Pipe(duplex=False)
    first = context.Process(target=hold, args=(tmp_path / "run", tell))
    first.start()
    child = told.recv()
    try:
        with pytest.raises(InputError, match=f"{tmp_path}/run: another process works there"):
            with only_one_in(tmp_path / "run"):
                pass
        first.kill()
        first.join()
        with only_one_in(tmp_path / "run"):  # although the child, which outlives it, has inherited its files
            pass
    finally:
        os.kill(child, signal.SIGKILL)
