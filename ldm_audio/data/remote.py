"""Files behind http(s) addresses: read once from the beginning, or some bytes from the middle.

Nothing is kept on disk. What fails in a way that may pass is tried again. A server that ignores Range headers
is read up to the bytes that were asked for, which is slow for all but small files; a warning says so.
"""

import logging
import re
import time
from collections.abc import Callable
from functools import cache
from http.client import HTTPException, HTTPResponse
from typing import TypeVar
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from ldm_audio.errors import InputError

logger = logging.getLogger(__name__)

TIMEOUT = 60  # seconds without a byte
PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try
PASSING = (408, 425, 429, 500, 502, 503, 504)  # status codes that are worth one
BLOCK = 1 << 20
NUMBERS = re.compile(r"\{(\d+)\.\.(\d+)\}")

T = TypeVar("T")


def is_address(path: object) -> bool:
    """Whether this names a file on a web server."""
    return str(path).startswith(("http://", "https://"))


def expand(address: str) -> list[str]:
    """`.../{000..031}.tar` -> the 32 addresses that it stands for, with numbers as wide as the first."""
    found = NUMBERS.search(address)
    if found is None:
        return [address]
    first, last = found.groups()
    numbers = range(int(first), int(last) + 1)
    if not numbers:
        raise InputError(f"{address}: stands for no address, expected {{FIRST..LAST}} with FIRST up to LAST")
    before, after = address[: found.start()], address[found.end() :]
    return [whole for n in numbers for whole in expand(f"{before}{n:0{len(first)}d}{after}")]


class Body:
    """What a server sends, read once; tells a connection that was lost from the end.

    length: bytes, None where the server does not say.
    """

    def __init__(self, response: HTTPResponse):
        self.response = response
        self.length = response.length
        self.done = 0

    def read(self, size: int) -> bytes:
        """`size` bytes, fewer at the end alone; ConnectionError where the connection was lost before it."""
        found = self.response.read(size)
        self.done += len(found)
        if len(found) < size and self.length is not None and self.done < self.length:
            raise ConnectionError(f"connection lost after {self.done} of {self.length} bytes")
        return found


def version(address: str) -> list[str]:
    """What the server says of a file and what changes with it: its length, and its ETag or else its date."""

    def headers() -> list[str]:
        with request(address, {}) as response:  # not HEAD, which signed addresses forbid
            told = response.headers
            return [told.get("Content-Length", ""), told.get("ETag") or told.get("Last-Modified", "")]

    return trying(address, headers)


def read_through(address: str, reader: Callable[[Body], T]) -> T:
    """What `reader` makes of the file from its beginning on; begun anew where the connection is lost."""

    def whole() -> T:
        with request(address, {}) as response:
            return reader(Body(response))

    return trying(address, whole)


def read_part(address: str, start: int, size: int) -> bytes:
    """`size` bytes from `start` on, fewer where the file ends."""

    def part() -> bytes:
        with request(address, {"Range": f"bytes={start}-{start + size - 1}"}) as response:
            body = Body(response)
            if response.status != 206:
                warn_of_whole_files(urlsplit(address).netloc)
                for skipped in range(0, start, BLOCK):
                    body.read(min(BLOCK, start - skipped))
            return body.read(size)

    return trying(address, part) if size else b""


def request(address: str, headers: dict[str, str]) -> HTTPResponse:
    return urlopen(Request(address, headers=headers), timeout=TIMEOUT)


def trying(address: str, attempt: Callable[[], T]) -> T:
    """What `attempt` returns, after a few tries where the network fails; InputError where all fail."""
    for pause in (*PAUSES, None):
        try:
            return attempt()
        except HTTPError as error:
            error.close()
            reason = f"{error.code} {error.reason}"
            if error.code not in PASSING:
                break
        except (OSError, HTTPException) as error:
            reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        if pause is not None:
            time.sleep(pause)
    raise InputError(f"{address}: not to be had from its server ({reason})")


@cache
def warn_of_whole_files(server: str) -> None:
    """Once for each server in each process."""
    logger.warning(f"{server}: ignores Range headers, so each clip reads its tar up to there; copy the tars")
