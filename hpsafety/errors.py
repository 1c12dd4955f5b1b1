"""The exceptions that one line explains: wrong input (the CLI exits with 2) and a failure in running (1)."""


class InputError(Exception):
    """Bad input or usage. The message is one line: file, line, field, what was expected, how to mend it."""


class RunError(Exception):
    """Failed in running for a reason that the message, one line, explains."""


def file_error(path, message: str, line: int | None = None) -> InputError:
    """An InputError that starts with FILE: or FILE:LINE:, as compilers do, so that editors can jump there."""
    where = f"{path}:{line}" if line is not None else f"{path}"
    return InputError(f"{where}: {message}")
