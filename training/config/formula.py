"""Compile a formula in x, written in a recipe, to a Python function.

Only arithmetic and a few math functions are allowed.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from functools import lru_cache
from typing import Final

Function = Callable[[float], float]

ALLOWED: Final = (
    "use numbers, x, pi, + - * / **, parentheses, and the functions sin, cos, exp, log, sqrt, abs, "
    "min and max"
)
LONGEST: Final = 200

_OPERATORS: Final[dict[type[ast.AST], Callable[[float, float], float]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    # math.pow takes constant time; overflow and roots of negative numbers raise.
    ast.Pow: math.pow,
}
_OF_ONE: Final[dict[str, Function]] = {
    "sin": math.sin,
    "cos": math.cos,
    "exp": math.exp,
    "log": math.log,
    "sqrt": math.sqrt,
    "abs": abs,
}
_OF_MANY: Final[dict[str, Callable[..., float]]] = {"min": min, "max": max}


@lru_cache(maxsize=64)
def compile_formula(text: str) -> Function:
    """Compile a formula such as `1 / (1 + 0.1 * x)` to a function of x.

    `eval` is not used: the syntax tree is translated to closures node by node, and anything not
    listed in `ALLOWED` is refused. All arithmetic is in floats.

    Raises:
        ValueError: The text is not a valid formula. The returned function also raises ValueError if
            its result is not finite.
    """
    if len(text) > LONGEST:
        raise ValueError(f"a formula has at most {LONGEST} characters")
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        raise ValueError(f"no formula; {ALLOWED}") from None
    inner = _compile(tree.body)

    def function(x: float) -> float:
        try:
            value = inner(float(x))
        except (ArithmeticError, ValueError):
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"it has no finite value at x = {x:g}")
        return value

    return function


def _compile(node: ast.AST) -> Function:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            number = float(value)
            return lambda x: number
        case ast.Name(id="x"):
            return lambda x: x
        case ast.Name(id="pi"):
            return lambda x: math.pi
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _compile(operand)
            return lambda x: -inner(x)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _compile(operand)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            apply, first, second = _OPERATORS[type(op)], _compile(left), _compile(right)
            return lambda x: apply(first(x), second(x))
        case ast.Call(func=ast.Name(id=name), args=[only], keywords=[]) if name in _OF_ONE:
            of_one, argument = _OF_ONE[name], _compile(only)
            return lambda x: of_one(argument(x))
        case ast.Call(func=ast.Name(id=name), args=[_, _, *_] as some, keywords=[]) if (
            name in _OF_MANY
        ):
            of_many, arguments = _OF_MANY[name], [_compile(each) for each in some]
            return lambda x: of_many(each(x) for each in arguments)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed; {ALLOWED}")
