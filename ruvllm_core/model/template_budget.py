"""Bounds on what a chat template may compute.

Templates come with model files, so from strangers. Jinja's sandbox keeps them from reaching Python's internals, but
not from ``{{ "a" * 10**9 }}``. Here a `Budget` pays for each rendering:

- whatever an expression makes is charged when it is done: text by length, containers by places;
- what can make much out of little (``*``, ``replace``, ``join``, formats) is charged before it runs;
- no value may be large when written out, so that a list holding one long string many times is not cheap;
- every use of a variable or constant looks at the clock.

So memory and time of a rendering are bounded by the budget, and single operations by what is left of it.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from typing import Any

from ruvllm_core.errors import TemplateError

_BASE = 4_000_000  # units a template may spend on nothing; a unit is about a character or 10 ns
_PER_UNIT_OF_INPUT = 100  # and for each unit of its input
_SECONDS = 1.0  # of this thread's processor time, plus a microsecond per unit of input
_STEP = 8  # price of any guarded operation, and of a place in a container
_MAX_BITS = 4096
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)
_HINT = "its model file may be hostile or broken; give another template, or a raw prompt"
_WIDTH_FROM_VALUE = {"%": re.compile(r"%[-#0 +\d.]*\*"), "{": re.compile(r":[^{}]*\{")}


class Budget:
    """What is left for one rendering.

    Args:
        inputs: the values given to the template.
    """

    def __init__(self, inputs: Any) -> None:
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._limit: float = math.inf
        size = self.size(inputs)
        self._limit = self._left = _BASE + _PER_UNIT_OF_INPUT * size
        self._deadline = time.thread_time() + _SECONDS + size * 1e-6

    def spend(self, units: int = 0) -> None:
        """Pay for an operation. Raises `TemplateError` when the budget or the time is used up."""
        self._left -= units + _STEP
        if self._left < 0:
            raise TemplateError("the chat template computes too much", hint=_HINT)
        if time.thread_time() > self._deadline:
            raise TemplateError("the chat template takes too long", hint=_HINT)

    def size(self, value: Any) -> int:
        """Characters of `value` written out, about; shared parts count each time they occur."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            if value.bit_length() > _MAX_BITS:
                raise TemplateError(f"the chat template computes a number of more than {_MAX_BITS} bits", hint=_HINT)
            return value.bit_length() // 3 + 1
        if not isinstance(value, _CONTAINERS):
            return _STEP
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        total = _STEP * (len(value) + 1)
        for item in value:
            total += self.size(item) + (self.size(value[item]) if isinstance(value, dict) else 0)
            if total > self._limit:
                raise TemplateError("the chat template builds too large a value", hint=_HINT)
        self._sizes[id(value)] = (value, total)  # holding the value keeps its id from being reused
        return total

    def used(self, value: Any) -> Any:
        """Look at the clock. Returns `value`."""
        self.spend()
        return value

    def made(self, value: Any) -> Any:
        """Pay for a value that an expression made. Returns it."""
        size = self.size(value)
        self.spend(_STEP * len(value) if isinstance(value, _CONTAINERS) else size)
        return value

    def text(self, value: Any) -> Any:
        """Pay for writing `value` out. Returns it."""
        self.spend(self.size(value))
        return value

    def joined(self, parts: Iterable[Any]) -> str:
        """All of `parts` written out."""
        return "".join([str(self.text(part)) for part in parts])

    def read(self, *values: Any) -> None:
        """Pay for an operation that goes through its operands."""
        self.spend(sum(len(value) for value in values if isinstance(value, str)))

    def times(self, left: Any, right: Any) -> int:
        """Cost of ``left * right``."""
        for sequence, number in ((left, right), (right, left)):
            if isinstance(sequence, (str, list, tuple)) and isinstance(number, int):
                return self.size(sequence) * max(number, 0)
        return 0

    def power(self, left: Any, right: Any) -> int:
        """Cost of ``left ** right``."""
        return (left.bit_length() * right) ** 2 if isinstance(left, int) and isinstance(right, int) else 0

    def percent(self, pattern: Any, *values: Any, **named: Any) -> int:
        """Cost of ``pattern % values``."""
        return self._fields("%", str(pattern), values, named) if isinstance(pattern, str) else 0

    def braces(self, pattern: str, *values: Any, **named: Any) -> int:
        """Cost of ``pattern.format(*values, **named)``."""
        return self._fields("{", pattern, values, named)

    def _fields(self, mark: str, pattern: str, *values: Any) -> int:
        """Every field may write all of the values, and be as wide as the numbers in the pattern say."""
        if _WIDTH_FROM_VALUE[mark].search(pattern):
            raise TemplateError("the chat template formats with a width that is computed", hint=_HINT)
        widths = sum(map(int, re.findall(r"\d{1,9}", pattern)))
        return len(pattern) + widths + pattern.count(mark) * self.size(values)

    def replace(self, text: Any, old: Any, new: Any, *_: Any, **__: Any) -> int:
        """Cost of ``text.replace(old, new)``."""
        return str(text).count(str(old)) * self.size(new)

    def join(self, separator: Any, items: Any) -> int:
        """Cost of ``separator.join(items)``."""
        return self.size(items) + len(items) * self.size(separator)

    def indent(self, text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
        """Cost of ``text | indent(width)``; any character may end a line."""
        return self.size(text) * (len(width) if isinstance(width, str) else abs(int(width)))

    def sorting(self, *values: Any, **_: Any) -> int:
        """Cost of an operation that compares the parts of its operand with each other."""
        return 16 * self.size(values)

    def digits(self, _: Any, precision: Any = 0, *__: Any, **___: Any) -> int:
        """Cost of ``value | round(precision)``, which computes a power of ten."""
        return 1000 * abs(int(precision))


# Filters, and methods of strings and containers, that templates may use. Others can make much out of little, or are
# of no use here.
FILTERS = """
    abs capitalize count d default dictsort e escape first float format indent int items join last length list lower
    map max min reject rejectattr replace reverse round safe select selectattr sort string title tojson trim truncate
    unique upper urlencode wordcount
""".split()  # noqa: SIM905 (a column of names would be long)
METHODS = """
    capitalize casefold copy count endswith find format get index isalnum isalpha isascii isdecimal isdigit islower
    isnumeric isspace istitle isupper items join keys lower lstrip partition removeprefix removesuffix replace rfind
    rindex rpartition rsplit rstrip split splitlines startswith strip title upper values
""".split()  # noqa: SIM905

# Those that pay in advance.
_Prices = dict[str, Callable[..., int]]
OPERATOR_PRICES: _Prices = {"*": Budget.times, "**": Budget.power, "%": Budget.percent}
METHOD_PRICES: _Prices = {"format": Budget.braces, "join": Budget.join, "replace": Budget.replace}
FILTER_PRICES: _Prices = {
    "format": Budget.percent,
    "indent": Budget.indent,
    "replace": Budget.replace,
    "round": Budget.digits,
    **dict.fromkeys(("dictsort", "max", "min", "sort", "unique"), Budget.sorting),
}
