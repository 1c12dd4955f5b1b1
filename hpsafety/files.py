"""Writing files so that a reader sees the old content or the new one, never half of it."""

import contextlib
import os
import secrets
from pathlib import Path


def fsync_dir(path) -> None:
    """Flush a directory entry to disk, so that a rename in it survives a power cut."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextlib.contextmanager
def atomic_write(path, mode: str = "w"):
    """Open a temporary file beside `path`; on a clean exit flush, fsync and rename it over `path`.

    path  file to create or replace; its folder must exist
    mode  "w" (UTF-8 text, \n line ends) or "wb"
    On an exception the temporary file is removed and `path` keeps what it held. OSError passes through.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with open(temporary, mode, **text) as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        fsync_dir(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
