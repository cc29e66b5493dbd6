"""A Jinja environment in which every operation is paid from a `Budget`.

The template's syntax tree is rewritten before it is compiled: what Jinja would leave to plain Python (variables,
literals, slices, ``~``) goes through internal filters whose names no template can spell.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, ItemsView, Iterable, KeysView, ValuesView
from typing import Any, NoReturn

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment, safe_range
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ruvllm_core.model.template_budget import FILTER_PRICES, FILTERS, METHOD_PRICES, METHODS, OPERATOR_PRICES, Budget

_USED, _MADE, _JOINED = "<used>", "<made>", "<joined>"
_DATA = (str, dict, list, tuple, KeysView, ValuesView, ItemsView)
_JINJAS_OWN = (Macro, LoopContext, BlockReference, Undefined)


class GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's words for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class OpaqueNamespace(Namespace):
    """A namespace that cannot be written out: it changes, so no size of it could be relied on."""

    def __repr__(self) -> NoReturn:
        raise SecurityError("a namespace cannot be written out")


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with the whitespace rules of chat templates, and a price on everything.

    Args:
        functions: what templates can call besides ``range``, ``dict``, and ``namespace``.

    Attributes:
        budget: pays for the rendering under way; set it before each one.
    """

    budget: Budget
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self, **functions: Callable[..., Any]) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            extensions=[GenerationTag, loopcontrols],
            finalize=pass_context(lambda _, value: self.budget.text(value)),
        )
        built_in: dict[str, Any] = {**self.filters, "join": self._join, "tojson": self._tojson}
        tests: dict[str, Any] = dict(self.tests)
        self.filters = {name: self._paid(built_in[name], FILTER_PRICES.get(name)) for name in FILTERS}
        self.filters[_USED] = lambda value: self.budget.used(value)
        self.filters[_MADE] = lambda value: self.budget.made(value)
        self.filters[_JOINED] = self.concat
        self.tests = {name: self._paid(test, None) for name, test in tests.items()}
        self.globals = {"range": safe_range, "dict": dict, "namespace": OpaqueNamespace, **functions}

    def template(self, source: str) -> Template:
        """`source`, compiled with its prices."""
        tree = _Pricing().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def concat(self, parts: Iterable[Any]) -> str:
        """What Jinja puts together: all output, the results of macros and of blocks."""
        return self.budget.joined(parts)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator in OPERATOR_PRICES:
            self.budget.spend(OPERATOR_PRICES[operator](self.budget, left, right))
        return self.budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        if isinstance(owner, _DATA):
            name = method.__name__
            if name not in METHODS:
                raise SecurityError(f"the method {name} cannot be used in a chat template")
            if name == "join":
                args = (self.budget.made(list(*args)),)
            self.budget.read(owner)
            if name in METHOD_PRICES:
                named = {key: value for key, value in kwargs.items() if key not in ("_loop_vars", "_block_vars")}
                self.budget.spend(METHOD_PRICES[name](self.budget, owner, *args, **named))
        elif not (isinstance(method, _JINJAS_OWN) or isinstance(owner, LoopContext) or method in self.globals.values()):
            raise SecurityError(f"{method!r} cannot be called in a chat template")
        return self.budget.made(super().call(context, function, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend()
        return super().getitem(obj, argument)

    def _paid(self, function: Callable[..., Any], price: Callable[..., int] | None) -> Callable[..., Any]:
        """`function`, a filter or test, which pays for its operands, by its `price`, and for what it returns."""
        skip = int(hasattr(function, "jinja_pass_arg"))  # then the first argument is Jinja's, not the template's

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.budget.read(*args[skip:])
            if price is not None:
                self.budget.spend(price(self.budget, *args[skip:], **kwargs))
            return self.budget.made(function(*args, **kwargs))

        return paid

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        items = list(value if attribute is None else map(make_attrgetter(self, attribute), value))
        self.budget.spend(self.budget.join(d, items))
        return str(d).join(map(str, items))

    def _tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: Any = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:
        width = len(indent) if isinstance(indent, str) else int(indent or 0)
        self.budget.spend(1000 * max(width, 0))  # of the deepest line that Python's recursion limit lets it write
        options = {"indent": indent, "separators": separators, "sort_keys": sort_keys}
        return self.concat(json.JSONEncoder(ensure_ascii=ensure_ascii, **options).iterencode(value))


class _Pricing(NodeTransformer):
    """Puts internal filters around what Jinja compiles to plain Python."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if not isinstance(node, nodes.Expr) or getattr(node, "ctx", "load") != "load":  # the latter is assigned to
            return node
        if isinstance(node, nodes.Concat):
            return _filter(_JOINED, nodes.List(node.nodes, lineno=node.lineno))
        if isinstance(node, (nodes.Name, nodes.Const)):
            return _filter(_USED, node)
        slices = isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice)
        return _filter(_MADE, node) if slices or isinstance(node, (nodes.List, nodes.Tuple, nodes.Dict)) else node


def _filter(name: str, value: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)
