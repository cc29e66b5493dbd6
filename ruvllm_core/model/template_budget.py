"""Bounds on what a chat template may compute.

Templates come with model files, so from strangers. Jinja's sandbox keeps them from reaching Python's internals, but
not from ``{{ "a" * 10**9 }}``. Here every expression that can cost more than a constant is routed through a `Budget`:

- operators, calls, filters, tests, comparisons, slices, literals, each loop iteration and macro call pay before they
  run (for what can amplify) or when they are done (for what cannot);
- a value is charged by its expanded size, so that a list holding one long string many times is not cheap;
- only filters and methods whose cost is known are there at all.

So memory and time of a rendering are bounded by the budget, and single operations by what is left of it.
"""

from __future__ import annotations

import re
import time
from collections.abc import ItemsView, KeysView, Sized, ValuesView
from typing import Any

from ruvllm_core.errors import TemplateError

_BASE = 8_000_000  # units a template may spend on nothing; a unit is about a character or 10 ns
_PER_UNIT_OF_INPUT = 200  # and for each unit of its input
_SECONDS = 1.0  # of this thread's processor time, plus a microsecond per unit of input
_STEP = 8  # price of any guarded operation, and of a place in a container
_MAX_BITS = 4096
_CONTAINERS = (list, tuple, dict, set, frozenset, KeysView, ValuesView, ItemsView)
_HINT = "its model file may be hostile or broken; give another template, or a raw prompt"
_WIDE_FIELD = re.compile(r"\*|\d{4,}")


class Budget:
    """What is left for one rendering.

    Args:
        inputs: the values given to the template.
    """

    def __init__(self, inputs: Any) -> None:
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._limit = _BASE
        size = self.size(inputs)
        self._limit = self._left = _BASE + _PER_UNIT_OF_INPUT * size
        self._deadline = time.thread_time() + _SECONDS + size * 1e-6
        self._steps = 0

    def spend(self, units: int) -> None:
        """Pay for an operation. Raises `TemplateError` when the budget or the time is used up."""
        self._left -= max(units, 0) + _STEP
        self._steps += 1
        if self._left < 0:
            raise TemplateError("the chat template computes too much", hint=_HINT)
        if (units > 1000 or self._steps % 16 == 0) and time.thread_time() > self._deadline:
            raise TemplateError("the chat template takes too long", hint=_HINT)

    def size(self, value: Any) -> int:
        """Characters of `value` written out, about; shared parts count each time they occur."""
        if isinstance(value, str):
            return len(value)
        if isinstance(value, int):
            return value.bit_length() // 3 + 1
        if not isinstance(value, _CONTAINERS):
            return _STEP
        known = self._sizes.get(id(value))
        if known is not None:
            return known[1]
        total = _STEP * (len(value) + 1)
        for item in value:
            total += self._item_size(item)
            if isinstance(value, dict):
                total += self._item_size(value[item])
            if total > self._limit:
                raise TemplateError("the chat template builds too large a value", hint=_HINT)
        self._sizes[id(value)] = (value, total)  # holding the value keeps its id from being reused
        return total

    def _item_size(self, item: Any) -> int:
        if type(item).__name__ == "Namespace":  # it can change, so no size could be relied on
            raise TemplateError("the chat template puts a namespace into another value", hint=_HINT)
        return self.size(item)

    def made(self, value: Any) -> Any:
        """Pay for a value that an operation made: text by length, containers by places. Returns it."""
        if isinstance(value, str):
            self.spend(len(value))
        elif isinstance(value, Sized):
            self.size(value)
            self.spend(_STEP * len(value))
        return value

    def text(self, value: Any) -> Any:
        """Pay for writing `value` out. Returns it."""
        self.spend(self._item_size(value))
        return value

    def operate(self, name: str, left: Any, right: Any) -> None:
        """Pay in advance for a binary operator whose result can be much larger than its operands."""
        if name == "*":
            for sequence, times in ((left, right), (right, left)):
                if isinstance(sequence, (str, list, tuple)) and isinstance(times, int):
                    return self.spend((self.size(sequence) + _STEP) * max(times, 0))
            if isinstance(left, int) and isinstance(right, int):
                _check_bits(left.bit_length() + right.bit_length())
        elif name == "**" and isinstance(left, int) and isinstance(right, int):
            _check_bits(left.bit_length() * abs(right))
        elif name == "%" and isinstance(left, str):
            return self.spend(self.percent(left, right))
        return self.spend(0)

    def percent(self, pattern: Any, *values: Any, **named: Any) -> int:
        """Cost of ``pattern % values``."""
        self.text(pattern)
        spelled = str(pattern)
        if any(_WIDE_FIELD.search(field) for field in re.findall(r"%[^a-zA-Z%]*", spelled)):
            raise TemplateError("the chat template formats with too wide a field", hint=_HINT)
        return spelled.count("%") * (1000 + self.size(values) + self.size(named))

    def braces(self, pattern: str, *values: Any, **named: Any) -> int:
        """Cost of ``pattern.format(*values, **named)``."""
        if re.search(r":[^{}]*(\{|\d{4,})", pattern):
            raise TemplateError("the chat template formats with too wide a field", hint=_HINT)
        return len(pattern) + pattern.count("{") * (1000 + self.size(values) + self.size(named))

    def replace(self, text: Any, old: Any, new: Any, count: Any = None) -> int:
        """Cost of ``text.replace(old, new)``."""
        places = text.count(str(old)) if isinstance(text, str) else self.size(text)
        return self.size(text) + places * self.size(new)

    def join(self, separator: Any, items: Any) -> int:
        """Cost of ``separator.join(items)``."""
        return self.size(items) + len(items) * self.size(separator)

    def indent(self, text: Any, width: Any = 4, *_: Any, **__: Any) -> int:
        """Cost of ``text | indent(width)``."""
        lines = text.count("\n") + 1 if isinstance(text, str) else self.size(text)
        return self.size(text) + lines * (len(width) if isinstance(width, str) else abs(int(width)))

    def tojson(self, value: Any, ensure_ascii: Any = False, indent: Any = None, **_: Any) -> int:
        """Cost of ``value | tojson``; indentation grows with depth, which is at most the recursion limit."""
        width = len(indent) if isinstance(indent, str) else int(indent or 0)
        if width > 16:
            raise TemplateError("the chat template indents JSON by more than 16 columns", hint=_HINT)
        return self.size(value) * (6 if ensure_ascii else 2)

    def whole(self, *values: Any, **_: Any) -> int:
        """Cost of an operation that goes through all of its operands."""
        return sum(self.size(value) for value in values)

    def sorting(self, *values: Any, **_: Any) -> int:
        """Cost of an operation that compares the parts of its operand with each other."""
        return 16 * self.whole(*values)

    def places(self, *values: Any, **_: Any) -> int:
        """Cost of an operation that touches each place of its operand, but not what is in it."""
        return _STEP * len(values[0]) if values and isinstance(values[0], Sized) else 0

    def rounding(self, value: Any, precision: Any = 0, *_: Any, **__: Any) -> int:
        """Cost of ``value | round(precision)``, which computes a power of ten."""
        if abs(int(precision)) > 100:
            raise TemplateError("the chat template rounds to more than 100 digits", hint=_HINT)
        return self.size(value)

    def nothing(self, *_: Any, **__: Any) -> int:
        """Cost of an operation that takes the same time for every operand."""
        return 0


# Filters with known costs, each with the `Budget` method that prices it. Every other filter is left out.
FILTER_PRICES = {
    "abs": "nothing",
    "capitalize": "whole",
    "count": "nothing",
    "d": "nothing",
    "default": "nothing",
    "dictsort": "sorting",
    "e": "whole",
    "escape": "whole",
    "first": "nothing",
    "float": "whole",
    "format": "percent",
    "indent": "indent",
    "int": "whole",
    "items": "places",
    "join": "nothing",
    "last": "places",
    "length": "nothing",
    "list": "places",
    "lower": "whole",
    "map": "places",
    "max": "sorting",
    "min": "sorting",
    "reject": "places",
    "rejectattr": "places",
    "replace": "replace",
    "reverse": "places",
    "round": "rounding",
    "safe": "whole",
    "select": "places",
    "selectattr": "places",
    "sort": "sorting",
    "string": "whole",
    "title": "whole",
    "tojson": "tojson",
    "trim": "whole",
    "truncate": "whole",
    "unique": "sorting",
    "upper": "whole",
    "urlencode": "whole",
    "wordcount": "whole",
}
# Methods of strings and containers that may be called, priced likewise. Every other method is refused.
_TEXT_METHODS = """
    capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit islower isnumeric isspace
    istitle isupper lower lstrip partition removeprefix removesuffix rfind rindex rpartition rsplit rstrip split
    splitlines startswith strip title upper
"""
METHOD_PRICES = dict.fromkeys(_TEXT_METHODS.split(), "whole") | {
    "copy": "places",
    "format": "braces",
    "get": "nothing",
    "items": "nothing",
    "join": "join",
    "keys": "nothing",
    "replace": "replace",
    "values": "nothing",
}


def _check_bits(bits: int) -> None:
    if bits > _MAX_BITS:
        raise TemplateError(f"the chat template computes a number of more than {_MAX_BITS} bits", hint=_HINT)
