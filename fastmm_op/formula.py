"""Integers that remember how they were computed, so that arithmetic on them can be printed."""

import ast
import operator


class Formula(int):
    """An integer and the Python expression that it is the value of.

    Sums, differences, products, whole quotients and remainders with integers are Formulas; a
    ceiling division, ``-(-a // b)``, is written as ``triton.cdiv(a, b)``. Everything else
    (comparisons, ``min``, shifts) takes the value, and answers for it alone.
    """

    node: ast.expr

    def __new__(cls, value: int, node: ast.expr) -> "Formula":
        self = super().__new__(cls, value)
        self.node = node
        return self

    @classmethod
    def named(cls, name: str, value: int) -> "Formula":
        """A variable called ``name``, whose value is ``value`` here."""
        return cls(value, ast.Name(name))

    def __add__(self, other):
        return combine(self, ast.Add(), other)

    def __radd__(self, other):
        return combine(other, ast.Add(), self)

    def __sub__(self, other):
        return combine(self, ast.Sub(), other)

    def __rsub__(self, other):
        return combine(other, ast.Sub(), self)

    def __mul__(self, other):
        return combine(self, ast.Mult(), other)

    def __rmul__(self, other):
        return combine(other, ast.Mult(), self)

    def __floordiv__(self, other):
        return combine(self, ast.FloorDiv(), other)

    def __rfloordiv__(self, other):
        return combine(other, ast.FloorDiv(), self)

    def __mod__(self, other):
        return combine(self, ast.Mod(), other)

    def __rmod__(self, other):
        return combine(other, ast.Mod(), self)

    def __neg__(self):
        match self.node:
            case ast.BinOp(ast.UnaryOp(ast.USub(), numerator), ast.FloorDiv(), denominator):
                cdiv = ast.Attribute(ast.Name("triton"), "cdiv")
                return Formula(-int(self), ast.Call(cdiv, [numerator, denominator], []))
            case ast.UnaryOp(ast.USub(), operand):
                return Formula(-int(self), operand)
        return Formula(-int(self), ast.UnaryOp(ast.USub(), self.node))


COMPUTE = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
# What leaves the other operand as it is, on either side or on the right only.
NEUTRAL = {ast.Add: 0, ast.Mult: 1}
NEUTRAL_ON_THE_RIGHT = NEUTRAL | {ast.Sub: 0, ast.FloorDiv: 1}


def combine(left: int, operation: ast.operator, right: int) -> Formula:
    """The Formula of ``left operation right``, of which one is a Formula and one may be an int."""
    if not isinstance(left, int) or not isinstance(right, int):
        return NotImplemented
    kind = type(operation)
    value = COMPUTE[kind](int(left), int(right))
    if not isinstance(right, Formula) and right == NEUTRAL_ON_THE_RIGHT.get(kind):
        return Formula(value, left.node)
    if not isinstance(left, Formula) and left == NEUTRAL.get(kind):
        return Formula(value, right.node)
    return Formula(value, ast.BinOp(node_of(left), operation, node_of(right)))


def node_of(value: int) -> ast.expr:
    return value.node if isinstance(value, Formula) else ast.Constant(int(value))
