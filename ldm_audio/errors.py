"""The two errors that entry points tell in one line: the user's input is wrong, or a run cannot go on."""


class InputError(ValueError):
    """A file, config key or value that cannot be used; the message names it and what was expected.

    Entry points print it as one line without a traceback.
    """


class RunError(Exception):
    """What stops a run although its input was right: losses that are not finite, a full disk.

    The message says what is still whole; entry points print it as one line without a traceback.
    """
