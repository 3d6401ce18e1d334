"""The one error type that means: what the user gave is wrong."""


class InputError(ValueError):
    """A file, config key or value that cannot be used; the message names it and what was expected.

    Entry points print it as one line without a traceback.
    """
