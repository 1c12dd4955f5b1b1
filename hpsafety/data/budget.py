"""What rendering a chat template may cost: units for the size of each value made, and processor time.

A character is a unit, a list entry NODE of them. The budget belongs to the thread that renders.
"""

import threading
import time
from collections.abc import ItemsView, Iterator, KeysView, ValuesView

from jinja2.runtime import LoopContext

NODE = 16
SECONDS = 0.5  # processor time of this thread, each for compiling and rendering; a real template needs 0.05
TIME_CHECK_UNITS = 16_384
MAX_INT_BITS = 4096
_active = threading.local()


class TemplateLimitError(Exception):
    """The template wanted more work, memory or time than a chat template needs."""


class Budget:
    """What one compilation or rendering may still spend; `with` makes it this thread's."""

    def __init__(self, units: int):
        self.left = units
        self.unchecked = 0
        self.deadline = time.thread_time() + SECONDS

    def __enter__(self):
        self.outer = getattr(_active, "budget", None)
        _active.budget = self

    def __exit__(self, *error):
        _active.budget = self.outer

    def charge(self, units: int) -> None:
        units = max(units, 0)  # a template may ask for a negative width; that must not fill the budget up
        self.left -= units
        if self.left < 0:
            raise TemplateLimitError("it builds too much text or loops too often")
        self.unchecked += units
        if self.unchecked > TIME_CHECK_UNITS:
            self.unchecked = 0
            self.check_time()

    def check_time(self) -> None:
        if time.thread_time() > self.deadline:
            raise TemplateLimitError("it runs too long")


def check_time() -> None:
    """Raise TemplateLimitError when this thread's budget is out of time."""
    _active.budget.check_time()


def charge(units: int) -> None:
    """Take units from this thread's budget; raises TemplateLimitError when it is used up."""
    _active.budget.charge(units)


def measure(value, limit: float | None = None) -> int:
    """Units of a value written out as a tree; counting ends beyond `limit` (what is left of the budget)."""
    limit = _active.budget.left if limit is None else limit
    total, stack = 0, [value]
    while stack and total <= limit:
        item = stack.pop()
        total += NODE
        if isinstance(item, str):
            total += len(item)
        elif isinstance(item, dict):
            total += 2 * NODE * len(item)
            stack.extend(item)
            stack.extend(item.values())
        elif isinstance(item, (list, tuple, range, set, KeysView, ValuesView, ItemsView)):
            total += NODE * len(item)
            if not isinstance(item, range):
                stack.extend(item)
        elif isinstance(item, int) and item.bit_length() > MAX_INT_BITS:
            raise TemplateLimitError("it makes a number of more than a thousand digits")
    return total


def bounded(value):
    """The value, charged; an iterator, which could hide any amount of work, becomes a list, item by item."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        items = []
        for item in value:
            charge(measure(item))
            items.append(item)
        return items
    charge(measure(value))
    return value


def tick(units: int) -> None:
    """Charge a round of a loop or macro that writes `units` characters of the template itself."""
    charge(NODE + units)
