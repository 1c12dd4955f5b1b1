"""One program of a grid alone: how offsets past 2^31 are computed where nobody could run, or hold, all the others."""

from unittest import mock

import pytest
import triton.runtime.interpreter as stock

from hpsafety.triton_kernels.launch import INTERPRETED, launch

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="watches the interpreter; the kernels run on a GPU here"
)


def last_program(kernel, programs, *arguments, **options) -> None:
    """Stands for launch() in a module of kernels, in the interpreter: the grid's last program runs and no other."""
    builder = stock.InterpreterBuilder
    dim, at = builder.set_grid_dim, builder.set_grid_idx
    with (
        mock.patch.object(builder, "set_grid_dim", lambda this, *_: dim(this, programs, 1, 1)),
        mock.patch.object(builder, "set_grid_idx", lambda this, *_: at(this, programs - 1, 0, 0)),
    ):
        launch(kernel, min(programs, 1), *arguments, **options)
