"""Work on a stream of items in several processes, results in the order of the items, a bounded number in flight."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from hpsafety.errors import RunError

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextlib.contextmanager
def processes(workers: int) -> Iterator[ProcessPoolExecutor | None]:
    """Worker processes, started when the first work comes; None for one worker, which is this process itself."""
    if workers == 1:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):  # as in the workers: the last bits of numpy's products may depend on it
            yield None
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads, and break
    with _few_threads(), ProcessPoolExecutor(workers, context, _begin) as pool:
        try:
            yield pool
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def in_order(
    function: Callable, items: Iterable, pool: ProcessPoolExecutor | None, ahead: int = 8
) -> Iterator[tuple]:
    """(item, function(item)) of every item, in order.

    function  importable by name (a functools.partial of such a one), since other processes look it up
    ahead     items handed out before the oldest has its result
    Raises what the function raises, in its item's place, and RunError where a worker process dies.
    """
    if pool is None:
        for item in items:
            yield item, function(item)
        return
    waiting: deque = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > ahead:
                item, future = waiting.popleft()
                yield item, future.result()
        while waiting:
            item, future = waiting.popleft()
            yield item, future.result()
    except BrokenProcessPool:
        raise RunError(
            "a worker process ended before its work was done, perhaps for want of memory: --workers takes fewer; "
            "the same command goes on"
        ) from None


def _begin() -> None:
    """In a new worker: leaves Ctrl-C to the parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def _few_threads() -> Iterator[None]:
    """The processes that are started within compute in one thread each."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
