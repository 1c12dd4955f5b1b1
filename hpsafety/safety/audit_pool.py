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


def in_order(function: Callable, items: Iterable, workers: int) -> Iterator[tuple]:
    """(item, function(item)) of every item. One worker is this process itself.

    function  importable by name (a functools.partial of such a one), since new processes look it up
    Raises what the function raises, in its item's place, and RunError where a worker process dies.
    """
    if workers == 1:
        with _one_thread():
            for item in items:
                yield item, function(item)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy torch's threads, and break
    with _few_threads(), ProcessPoolExecutor(workers, context, _begin) as pool:
        waiting: deque = deque()
        try:
            for item in items:
                waiting.append((item, pool.submit(function, item)))
                if len(waiting) > 2 * workers:
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
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _begin() -> None:
    """In a new worker: leaves Ctrl-C to the parent, and ends with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _one_thread():
    """numpy's products in one thread, as in the workers: their last bits may depend on it."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1)


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
