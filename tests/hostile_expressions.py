"""Hostile pairs of a gold answer and an answer, of many kinds, from a seed; each with the verdicts that are right.

A generator knows whether its pair is equal: the verdict of an equal pair is never `wrong`, that of an unequal one never
`correct`. Anything may be unverifiable, for hostile expressions are made so that deciding takes for ever.
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

Draw = Callable[[random.Random], tuple[str, str, bool]]


@dataclass(frozen=True)
class Hostile:
    """A gold answer and a marked answer. equal: whether they denote the same."""

    kind: str
    gold: str
    answer: str
    equal: bool

    @property
    def forbidden(self) -> str:
        """The verdict that would be false."""
        return "wrong" if self.equal else "correct"


def _nested(opening: str, inner: str, closing: str, depth: int) -> str:
    return opening * depth + inner + closing * depth


def power_tower(r: random.Random) -> tuple[str, str, bool]:
    base, height = r.randint(2, 9), r.randint(3, 9)
    tower = f"{base}^{{" * height + str(base) + "}" * height
    return tower, f"{tower}+{r.randint(1, 9)}", False


def factorial(r: random.Random) -> tuple[str, str, bool]:
    n = r.randint(10**4, 10**9)
    return f"{n}!", f"{n - 1}! \\cdot {n + r.randint(1, 5)}", False


def equal_factorial(r: random.Random) -> tuple[str, str, bool]:
    n = r.randint(5, 2000)
    return f"{n}!", f"{n - 1}! \\cdot {n}", True


def iterated_factorial(r: random.Random) -> tuple[str, str, bool]:
    return str(r.randint(1, 99)), f"({r.randint(20, 99)}!)" + "!" * r.randint(1, 4), False


def brackets(r: random.Random) -> tuple[str, str, bool]:
    n, depth = r.randint(1, 99), r.choice([30, 100, 400, 900])
    opening, closing = r.choice([("(", ")"), ("{", "}"), (r"\left(", r"\right)")])
    return str(n), _nested(opening, str(n), closing, depth), True


def open_brackets(r: random.Random) -> tuple[str, str, bool]:
    return str(r.randint(1, 9)), r.choice("([{") * r.randint(5, 1500), False


def fractions(r: random.Random) -> tuple[str, str, bool]:
    n, depth = r.randint(2, 99), r.randint(5, 60)
    return str(n), r"\frac{1}{" * (2 * depth) + str(n) + "}" * (2 * depth), True


def roots(r: random.Random) -> tuple[str, str, bool]:
    depth = r.randint(2, 12)
    nested = r"\sqrt{2+" * depth + "2" + "}" * depth
    return "2", nested, True


def sums_of_roots(r: random.Random) -> tuple[str, str, bool]:
    primes = r.sample([2, 3, 5, 7, 11, 13, 17, 19, 23, 29], r.randint(4, 9))
    terms = [rf"\sqrt{{{prime}}}" for prime in primes]
    return "+".join(terms), "+".join(r.sample(terms, len(terms))) + "+10^{-40}", False


def large_powers(r: random.Random) -> tuple[str, str, bool]:
    n = r.randint(500, 10**7)
    return f"(x+y+1)^{{{n}}}", f"(x+y+1)^{{{n + 1}}}", False


def expanded_powers(r: random.Random) -> tuple[str, str, bool]:
    letters = r.sample("abcdfghkmnpq", r.randint(2, 8))
    base, n = "(" + "+".join(letters) + ")", r.randint(2, 45)
    return f"{base}^{{{n + 1}}}", "+".join(f"{base}^{{{n}}}{letter}" for letter in letters), True


def tiny_numbers(r: random.Random) -> tuple[str, str, bool]:
    n = r.randint(20, 3000)
    return rf"\frac{{1}}{{{r.randint(2, 9)}^{{{n}}}}}", rf"\frac{{1}}{{{10}^{{{n}}}}}", False


def close_numbers(r: random.Random) -> tuple[str, str, bool]:
    n = r.randint(30, 900)
    return r"\pi", rf"\pi+10^{{-{n}}}", False


def many_digits(r: random.Random) -> tuple[str, str, bool]:
    digits = "".join(r.choice("123456789") for _ in range(r.randint(100, 1800)))
    return digits, digits[:-1] + str((int(digits[-1]) + 1) % 10), False


def endless_sums(r: random.Random) -> tuple[str, str, bool]:
    n = r.randint(6, 15)
    return rf"\sum_{{k=1}}^{{10^{{{n}}}}} k^{{{r.randint(2, 9)}}}", str(r.randint(1, 9)), False


def integrals(r: random.Random) -> tuple[str, str, bool]:
    return rf"\int_0^{{{r.randint(1, 9)}}} x^x \sin(e^x) \, dx", str(r.randint(100, 999)), False


def huge_angles(r: random.Random) -> tuple[str, str, bool]:
    return rf"\cos(10^{{10^{{{r.randint(2, 9)}}}}})", str(r.randint(2, 9)), False


def trigonometry(r: random.Random) -> tuple[str, str, bool]:
    n = r.randint(2, 9)
    return "1", rf"\sin^2({n}x+y)+\cos^2({n}x+y)", True


def logarithms(r: random.Random) -> tuple[str, str, bool]:
    a, b = r.randint(2, 99), r.randint(2, 99)
    return rf"\ln({a})+\ln({b})", rf"\ln({a * b + r.choice([1, 2])})", False


def binomials(r: random.Random) -> tuple[str, str, bool]:
    n = r.choice([40, 900, 10**5, 10**9])
    return rf"\binom{{{n}}}{{{n // 2}}}", rf"\binom{{{n}}}{{{n // 2 + 1}}}", False


def commands(r: random.Random) -> tuple[str, str, bool]:
    hostile = [r"\input{/etc/passwd}", r"\def\x{\x\x}\x", r"\csname end\endcsname", r"\loop\repeat", r"\write18{ls}"]
    return "5", r.choice(hostile) + "5" * r.randint(0, 3), False


def python(r: random.Random) -> tuple[str, str, bool]:
    hostile = [
        '__import__("os").abort()',
        "().__class__.__bases__[0]",
        "exec('1')",
        "[0]*10**12",
        "lambda: 5",
        "open('/')",
    ]
    return "5", r.choice(hostile) + " " * r.randint(0, 9), False


def long_lists(r: random.Random) -> tuple[str, str, bool]:
    numbers = [r.randint(1, 9) for _ in range(r.randint(50, 400))]
    return ", ".join(map(str, numbers)), ", ".join(map(str, [*numbers[:-1], 99])), False


def signs(r: random.Random) -> tuple[str, str, bool]:
    n, count = r.randint(1, 99), r.randint(2, 400)
    return str(n), "-" * (2 * count) + str(n), True


def divisions_by_zero(r: random.Random) -> tuple[str, str, bool]:
    return str(r.randint(0, 9)), rf"\frac{{{r.randint(1, 9)}}}{{{r.choice(['0', '1-1', 'x-x', '0^{5}'])}}}", False


def polynomials(r: random.Random) -> tuple[str, str, bool]:
    terms = [f"{r.randint(2, 99)}x^{{{r.randint(20, 400)}}}" for _ in range(r.randint(5, 40))]
    return " + ".join(terms), " + ".join(terms[::-1]) + "+1", False


def characters(r: random.Random) -> tuple[str, str, bool]:
    return str(r.randint(1, 9)), "".join(r.choice("\\{}^_$%&#~|<>=+-*/!'\0\u202e\u0663é∮") for _ in range(40)), False


KINDS: tuple[Draw, ...] = (
    power_tower,
    factorial,
    equal_factorial,
    iterated_factorial,
    brackets,
    open_brackets,
    fractions,
    roots,
    sums_of_roots,
    large_powers,
    expanded_powers,
    tiny_numbers,
    close_numbers,
    many_digits,
    endless_sums,
    integrals,
    huge_angles,
    trigonometry,
    logarithms,
    binomials,
    commands,
    python,
    long_lists,
    signs,
    divisions_by_zero,
    polynomials,
    characters,
)


def hostile(count: int, seed: int = 19) -> Iterator[Hostile]:
    """`count` pairs, of all kinds in turn."""
    r = random.Random(seed)
    for i in range(count):
        kind = KINDS[i % len(KINDS)]
        gold, answer, equal = kind(r)
        yield Hostile(kind.__name__, gold, answer, equal)
