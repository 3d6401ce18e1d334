"""Files that appear whole or not at all, and folders that one process at a time works in."""

import errno
import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ldm_audio.errors import InputError, RunError

LOCK = ".lock"


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary name beside `path` to write to; it becomes `path` at the end, or goes on an error.

    Folders are made. The new file has the permissions that a plain `open` would give it. RunError where the
    system refuses the write (a full disk, no permission); what was at `path` is still there then.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        permissions = temporary.stat().st_mode
        yield temporary
        temporary.chmod(permissions)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise RunError(f"{path}: not written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def only_one_in(folder: Path) -> Iterator[None]:
    """Inside, no other process gets inside for the same folder, which is made: InputError that names it.

    The system takes the lock back when the process ends, however it ends. It is one of POSIX, which children
    do not inherit: data workers outlive a killed run by seconds. A file system without locks locks nothing.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunError(f"{folder}: not written ({error.strerror})") from error
    try:
        if not is_locked(descriptor):
            raise InputError(f"{folder}: another process works there: wait, or choose run=NAME")
        yield
    finally:
        os.close(descriptor)


def is_locked(descriptor: int) -> bool:
    """Takes the lock of an open file without waiting; False where another has it, not where none exist."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)
    return True


def remove_leftovers(folder: Path) -> None:
    """Deletes the temporary files below `folder` that killed processes left half-written."""
    for path in folder.rglob(".*.tmp"):
        path.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """UTF-8 text, atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Readable JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
