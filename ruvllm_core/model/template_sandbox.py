"""A Jinja environment in which every operation is paid from a `Budget`.

The template's syntax tree is rewritten before it is compiled: what Jinja would leave to plain Python (comparisons,
slices, ``~``, literals, loop bodies) goes through internal filters whose names no template can spell.
"""

# ruff: noqa: N802, N815 (Jinja names visitor methods after node classes)

from __future__ import annotations

import functools
import json
import types
from collections.abc import Callable, ItemsView, KeysView, ValuesView
from typing import Any

from jinja2 import Template, Undefined, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.runtime import BlockReference, Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from ruvllm_core.model.template_budget import FILTER_PRICES, METHOD_PRICES, Budget

_STEP, _MADE, _CONCAT, _LEFT, _RIGHT = "<step>", "<made>", "<concat>", "<left>", "<right>"
_DATA = (str, dict, list, tuple, KeysView, ValuesView, ItemsView)
_COMPARING_TESTS = {"==", "eq", "equalto", "!=", "ne", "<", "lt", "lessthan", "<=", "le", ">", "gt", "greaterthan"}
_COMPARING_TESTS |= {">=", "ge", "in", "lower", "upper"}


class GenerationTag(Extension):
    """``{% generation %}``: marks the assistant's words for training; renders its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja declares it so)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class BudgetedEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's immutable sandbox with the whitespace rules of chat templates, and a price on everything.

    Attributes:
        budget: pays for the rendering under way; set it before each one.
    """

    budget: Budget
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # nothing is computed while compiling
            extensions=[GenerationTag, loopcontrols],
            finalize=pass_context(lambda _, value: self.budget.text(value)),
        )
        built_in: dict[str, Any] = {**self.filters, "join": self._join, "tojson": _tojson}
        self.filters = {name: self.priced(price, built_in[name]) for name, price in FILTER_PRICES.items()}
        self.filters |= {
            _STEP: self._step,
            _MADE: lambda value: self.budget.made(value),
            _CONCAT: lambda values: "".join([str(self.budget.text(value)) for value in values]),
            _LEFT: self._left,
            _RIGHT: self._right,
        }
        tests: dict[str, Any] = dict(self.tests)
        self.tests = {
            name: self.priced("whole" if name in _COMPARING_TESTS else "nothing", test) for name, test in tests.items()
        }
        self.globals = {}
        self._callables: set[Any] = set()
        self.allow(range=range, dict=dict, namespace=Namespace)

    def allow(self, **functions: Callable[..., Any]) -> None:
        """Make functions global and callable."""
        self.globals.update(functions)
        self._callables.update(functions.values())

    def template(self, source: str) -> Template:
        """`source` compiled with its prices."""
        tree = _Pricing().visit(self.parse(source))
        tree.set_environment(self)
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def priced(self, price: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, a filter or test, paid by the `Budget` method `price` and again for what it returns."""
        skip = int(hasattr(function, "jinja_pass_arg"))  # then the first argument is Jinja's, not the template's

        @functools.wraps(function)
        def paid(*args: Any, **kwargs: Any) -> Any:
            self.budget.spend(getattr(self.budget, price)(*args[skip:], **kwargs))
            return self.budget.made(function(*args, **kwargs))

        return paid

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        self.budget.operate(operator, left, right)
        return self.budget.made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(function, "__wrapped__", function)  # the sandbox wraps str.format
        owner = getattr(method, "__self__", None)
        price = 0
        if isinstance(method, (types.BuiltinMethodType, types.MethodType)) and isinstance(owner, _DATA):
            if method.__name__ not in METHOD_PRICES:
                raise SecurityError(f"the method {method.__name__} cannot be used in a chat template")
            if method.__name__ == "join":
                args = (self.budget.made(list(*args)),)
            named = {name: value for name, value in kwargs.items() if name not in ("_loop_vars", "_block_vars")}
            price = getattr(self.budget, METHOD_PRICES[method.__name__])(owner, *args, **named)
        elif not (
            isinstance(method, (Macro, LoopContext, BlockReference, Undefined))
            or isinstance(owner, LoopContext)
            or method in self._callables
        ):
            raise SecurityError(f"{method!r} cannot be called in a chat template")
        self.budget.spend(price)
        return self.budget.made(super().call(context, function, *args, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        self.budget.spend(0)
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self.budget.spend(0)
        return super().getattr(obj, attribute)

    def _join(self, value: Any, d: Any = "", attribute: Any = None) -> str:
        items = list(value if attribute is None else map(make_attrgetter(self, attribute), value))
        self.budget.made(items)
        self.budget.spend(self.budget.join(d, items))
        return str(d).join(map(str, items))

    def _step(self, value: Any, units: int) -> Any:
        self.budget.spend(units)
        return value

    def _left(self, value: Any) -> Any:
        self.budget.spend(self.budget.size(value))
        return value

    def _right(self, value: Any) -> Any:
        self.budget.spend(0 if isinstance(value, (dict, range)) else self.budget.size(value))
        return value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _Pricing(NodeTransformer):
    """Puts internal filters around what Jinja compiles to plain Python."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.body.insert(0, _step(node, node.body))
        if node.test is not None:
            node.test = _filter(_STEP, node.test, nodes.Const(0, lineno=node.lineno))
        return node

    def visit_Macro(self, node: nodes.Macro) -> nodes.Macro:
        self.generic_visit(node)
        node.body.insert(0, _step(node, node.body))
        return node

    visit_CallBlock = visit_Block = visit_Macro

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(_CONCAT, nodes.List(node.nodes, lineno=node.lineno))

    def visit_Compare(self, node: nodes.Compare) -> nodes.Compare:
        self.generic_visit(node)
        node.expr = _filter(_LEFT, node.expr)
        for operand in node.ops:
            operand.expr = _filter(_RIGHT if operand.op in ("in", "notin") else _LEFT, operand.expr)
        return node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(_MADE, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_List(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _filter(_MADE, node) if getattr(node, "ctx", "load") == "load" else node

    visit_Dict = visit_Tuple = visit_List


def _filter(name: str, value: nodes.Node, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(value, name, list(args), [], None, None, lineno=value.lineno)


def _step(node: nodes.Node, body: list[nodes.Node]) -> nodes.ExprStmt:
    """The price of running `body` once: its constant text, which is written out unseen."""
    constants = [leaf for part in body for leaf in (part, *part.find_all((nodes.TemplateData, nodes.Const)))]
    units = sum(
        len(str(leaf.data if isinstance(leaf, nodes.TemplateData) else leaf.value))
        for leaf in constants
        if isinstance(leaf, (nodes.TemplateData, nodes.Const))
    )
    nothing = nodes.Const(None, lineno=node.lineno)
    return nodes.ExprStmt(_filter(_STEP, nothing, nodes.Const(units, lineno=node.lineno)), lineno=node.lineno)
