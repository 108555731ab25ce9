"""`\\begin…\\end`: matrices, determinants, systems and definitions by cases; and values as expressions and sets."""

from abc import abstractmethod
from collections.abc import Callable

import sympy

from distill.grading.math.expressions import checked
from distill.grading.math.operators import Operators
from distill.grading.math.values import Comparison, Matrix, Region, Scalar, Sequence, Unreadable, Value, Words

MATRICES = {"pmatrix", "bmatrix", "Bmatrix", "matrix", "array", "smallmatrix", "vmatrix"}
SYSTEMS = {"cases", "aligned", "align", "gathered"}
CONDITIONS = {"if", "for", "when", "where"}  # words in front of a condition
LARGEST = 6  # rows of a determinant


class Environments(Operators):
    """The rules of environments."""

    @abstractmethod
    def item(self) -> Value:
        """A value or a relation."""

    @abstractmethod
    def part(self) -> Value:
        """A value without a relation."""

    def environment(self) -> Value:
        """`\\begin{pmatrix}…\\end{pmatrix}` and its like. Errors: Unreadable for an environment that is not known."""
        self.position += 1
        name = self._name()
        if name not in MATRICES | SYSTEMS:
            raise Unreadable("unknown environment")
        if name == "array" and self.next.text == "{":
            while not self.take("}"):
                if self.next.kind == "end":
                    raise Unreadable("not parseable")
                self.position += 1
        rows = self._rows(self.item if name in SYSTEMS else self.part)
        if self._name() != name or len({len(row) for row in rows}) != 1:
            raise Unreadable("not parseable")
        if name in SYSTEMS:
            return _system(rows)
        if name == "vmatrix":
            return _determinant(rows)
        return self._transposed(Matrix(tuple(map(tuple, rows))))

    def scaled(self, factor: sympy.Expr, value: Value) -> Value:
        """A number times a matrix. Errors: Unreadable for anything else."""
        if not isinstance(value, Matrix):
            raise Unreadable("not parseable")
        rows = tuple(tuple(Scalar(checked(factor * expression_of(entry))) for entry in row) for row in value.rows)
        return Matrix(rows)

    def _rows(self, cell: Callable[[], Value]) -> list[list[Value]]:
        rows: list[list[Value]] = [[]]
        while not self.take("end"):
            while self.next.kind == "word" and self.next.text.lower() in CONDITIONS:
                self.position += 1
            rows[-1].append(cell())
            if self.next.text in (",", ";", ".") and self.peek(1).text in ("&", "\\\\", "end"):
                self.position += 1
            if self.take("\\\\"):
                if self.next.text != "end":
                    rows.append([])
            elif not self.take("&") and self.next.text != "end":
                raise Unreadable("not parseable")
        return rows

    def _name(self) -> str:
        self.expect("{")
        name = ""
        while self.next.kind in ("letter", "word"):
            name += self.next.text
            self.position += 1
        self.expect("}")
        return name

    def _transposed(self, matrix: Matrix) -> Matrix:
        """The matrix, turned where `^T` follows."""
        braces = self.peek(1).text == "{"
        if self.next.text != "^" or self.peek(2 if braces else 1).text != "T":
            return matrix
        self.position += 4 if braces else 2
        return Matrix(tuple(zip(*matrix.rows, strict=True)))


def _system(rows: list[list[Value]]) -> Value:
    """Rows of one column hold together; rows of two are values and their conditions, in any order."""
    if len(rows[0]) == 1:
        return Sequence(tuple(row[0] for row in rows))
    conditions = (Region, Comparison, Words)
    if len(rows[0]) != 2 or not all(isinstance(row[1], conditions) for row in rows):
        raise Unreadable("not parseable")
    return Sequence(tuple(Sequence(tuple(row), "()") for row in rows), "cases")


def _determinant(rows: list[list[Value]]) -> Value:
    if len(rows) != len(rows[0]) or len(rows) > LARGEST:
        raise Unreadable("not parseable")
    matrix = sympy.Matrix([[expression_of(entry) for entry in row] for row in rows])
    return Scalar(checked(matrix.det(method="berkowitz")))


def expression_of(value: Value) -> sympy.Expr:
    """The value as an expression. Errors: Unreadable where it has a unit or is none."""
    if isinstance(value, Scalar) and value.unit is None and value.base is None:
        return checked(value.expression / 100) if value.percent else value.expression
    raise Unreadable("not parseable")


def set_of(value: Value) -> sympy.Set:
    """The value as a set of real numbers. Errors: Unreadable."""
    if isinstance(value, Region):
        return value.points
    if isinstance(value, Sequence) and value.brackets == "{}":
        return sympy.FiniteSet(*map(expression_of, value.items))
    if isinstance(value, Sequence) and value.brackets[:1] in ("(", "[") and len(value.items) == 2:
        low, high = map(expression_of, value.items)  # outside `try`: Unreadable is a ValueError and has its own reason
        try:
            return sympy.Interval(low, high, value.brackets[0] == "(", value.brackets[1] == ")")
        except (ValueError, NotImplementedError) as error:  # sympy's, for ends that are not real numbers
            raise Unreadable("not an interval") from error
    raise Unreadable("not a set")
