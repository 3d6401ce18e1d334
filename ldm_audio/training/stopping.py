"""Ctrl-C and a scheduler's SIGTERM: a run that is asked to stop does so in order, after the step in hand."""

import contextlib
import signal
from collections.abc import Iterator

from ldm_audio import distributed


class Interrupted(Exception):
    """Ends a validation for a signal; it is due again in the next session."""


class StopSignal:
    """The number of the signal that asked a run to stop, 0 before one did; every rank has the same."""

    def __init__(self) -> None:
        self.number = 0
        self.here = 0
        self.may_interrupt = False

    def has_come(self) -> bool:
        """Whether a signal came to any rank; all ranks ask, and learn it, at the same place."""
        self.number = int(distributed.max_over_ranks(self.here))
        return bool(self.number)

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        """Inside, signals are noted; a second Ctrl-C interrupts at once.

        Under torchrun it does not: there a signal to the whole group comes twice, and SIGKILL comes last.
        """

        def note(number, frame):
            if self.here and number == signal.SIGINT and not distributed.is_launched():
                raise KeyboardInterrupt
            self.here = number
            if self.may_interrupt:
                self.may_interrupt = False
                raise Interrupted

        previous = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self, enabled: bool) -> Iterator[None]:
        """Inside, where a job may have no time to finish, a signal raises Interrupted at once."""
        self.may_interrupt = enabled
        try:
            yield
        finally:
            self.may_interrupt = False
