"""The one exception that means "the user's input is wrong": the CLI prints its single line and exits with 2."""


class InputError(Exception):
    """Bad input or usage. The message is one line: file, line, field, what was expected, how to mend it."""


def file_error(path, message: str, line: int | None = None) -> InputError:
    """An InputError that starts with FILE: or FILE:LINE:, as compilers do, so that editors can jump there."""
    where = f"{path}:{line}" if line is not None else f"{path}"
    return InputError(f"{where}: {message}")
