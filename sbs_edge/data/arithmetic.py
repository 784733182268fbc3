"""Compute the value of an arithmetic expression without running it as code.

Only numbers, ``+ - * / ** ( )`` and unary signs are understood; anything else has no value. Integers
and decimals are exact (:class:`fractions.Fraction`), so ``( 84.0 / 2.0 )`` equals ``42``.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable
from fractions import Fraction

__all__ = ["evaluate_expression", "same_value"]

MAX_CHARACTERS = 500
MAX_EXPONENT = 64
MAX_BITS = 4096

# Only these characters reach the parser: no names, no strings, and no text that makes it warn.
_ALPHABET = re.compile(r"[0-9.eE+*/() -]+")

_BINARY: dict[type[ast.operator], Callable[[Fraction, Fraction], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


class _NoValue(Exception):
    """The text is not an arithmetic expression of a bounded size."""


def _value(node: ast.AST, source: str) -> Fraction:
    match node:
        case ast.Expression(body=body):
            return _value(body, source)
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            # The literal's own text, so that 0.1 is a tenth and not its nearest double.
            text = ast.get_source_segment(source, node) or str(number)
            try:
                return _bounded(Fraction(_exponent_bounded(text)))
            except ValueError as error:
                raise _NoValue from error
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, source)
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return _value(operand, source)
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, power = _value(left, source), _value(right, source)
            if power.denominator != 1 or abs(power) > MAX_EXPONENT or (base == 0 and power < 0):
                raise _NoValue
            return _bounded(base ** int(power))
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            first, second = _value(left, source), _value(right, source)
            if isinstance(op, ast.Div) and second == 0:
                raise _NoValue
            return _bounded(_BINARY[type(op)](first, second))
        case _:
            raise _NoValue


def _exponent_bounded(text: str) -> str:
    mantissa, mark, exponent = text.lower().partition("e")
    if mark and abs(int(exponent)) > MAX_EXPONENT:  # 1e999999999 would be a gigabyte of digits
        raise _NoValue
    return mantissa + mark + exponent


def _bounded(number: Fraction) -> Fraction:
    if number.numerator.bit_length() > MAX_BITS or number.denominator.bit_length() > MAX_BITS:
        raise _NoValue
    return number


def evaluate_expression(text: str) -> Fraction | None:
    """Return the exact value of ``text``, or None if it is not an arithmetic expression.

    Bounded in length, exponent and size of numbers, so that hostile text costs nothing.
    """
    source = " ".join(text.split()) if len(text) <= MAX_CHARACTERS else ""
    if not _ALPHABET.fullmatch(source):
        return None
    try:
        return _value(ast.parse(source, mode="eval"), source)
    except (_NoValue, SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
        return None


def same_value(first: str, second: str) -> bool:
    """Return whether two expressions have the same value; an expression without a value equals nothing."""
    left, right = evaluate_expression(first), evaluate_expression(second)
    return left is not None and left == right
