"""Numbers with what follows them: a percent sign, degrees, units of measure, words that count things."""

import re
from fractions import Fraction

import sympy

from distill.grading.math.environments import Environments
from distill.grading.math.expressions import checked, power
from distill.grading.math.units import NUMBERS, PERCENT, PLACES, POWERS, SCALES, SHORT_PLACES, Unit, unit_of, word_unit
from distill.grading.math.values import Scalar, Token, Unreadable

TEMPERATURES = {"C": "celsius", "F": "fahrenheit"}
SCIENTIFIC = re.compile(r"-?\d*\.(\d+)(?:\*10\^\{?(-?\d+)\}?)?")
RAISED = {"squared": 2, "cubed": 3}
STATEMENTS = {  # words that say something about the number, or change it, wherever they are
    "is", "are", "was", "were", "isn't", "aren't", "not", "no", "do", "does", "don't", "doesn't", "cannot", "can't",
    "factorial", "pi", "below", "above", "loss", "decrease", "debt", "deficit", "less", "fewer", "than", "least",
    "most", "minus", "plus", "doubled", "tripled", "halved",
}  # fmt: skip
JUDGED = {  # at the end only: "2 wrong answers" is a number of them
    "wrong", "incorrect", "false", "invalid", "impossible", "possible", "negative",
}  # fmt: skip
OF_THE_NUMBER = {"root", "power"}  # directly after it: "1 real root" is a number of them
CHANGES = re.compile(  # at the end, or wherever it is, of the words after a number: another number, or none
    rf"(?:in |to )?base (?:{'|'.join(NUMBERS)})\b|parts per \w+|pp[mbt]\b|bps\b|basis points?\b"
    r"|(?:in )?(?:binary|octal|hex(?:adecimal)?)$|bound$"
)
REJECTED = re.compile(  # or changed: all of the words after a number
    r"(?:(?:is )?(?:ruled out|excluded|eliminated|rejected|discarded|fails|failed)|gross|score|myriads?|mil|mio|twice"
    r"|thrice|reciprocal|inverse|exclusive|down|underground|bce?|(?:\w+ )?ago|per (?:hundred|thousand|million))$"
)
PER_MILLE = re.compile(r"per ?mill?e?$|permille$")
ANSWERED = re.compile(r"is (?:the )?(?:(?:final|only|right|correct) )*(?:answer|solution|result|right|correct)")
PRODUCTS = {"ms", "Nm"}  # with a negative power, of both letters or of the second: no certain unit


class Quantities(Environments):
    """The rules of quantities."""

    def literal(self) -> Scalar | None:
        """Numbers that are no expression: with a base, and `1 1/2`."""
        start = self.position
        minus = self.take("-")
        first, second, slash, third = (self.peek(ahead) for ahead in range(4))
        sign = -1 if minus else 1
        if first.kind == "number" and first.subscript:
            self.position += 1
            if not (first.subscript.isdigit() and 2 <= int(first.subscript) <= 36 and first.text.isdigit()):
                raise Unreadable("unknown base")
            base = int(first.subscript)
            try:
                number = int(first.text, base)
            except ValueError as error:
                raise Unreadable("digits beyond the base") from error
            return Scalar(sympy.Integer(sign * number), base=base, digits=first.text.lstrip("0") or "0")
        digits = all(token.kind == "number" and token.text.isdigit() for token in (first, second, third))
        if digits and slash.text == "/" and second.spaced:
            top, bottom = int(second.text), int(third.text)
            if not 0 < top < bottom:
                raise Unreadable("ambiguous mixed number")
            self.position += 4
            value = sympy.Integer(first.text) + sympy.Rational(top, bottom)
            return self.with_unit(sign * value, None, "")
        self.position = start
        return None

    def decimals(self, start: int) -> int | None:
        """Digits after the point of the decimal number that was just read, `1.5` or `1.5 \\times 10^3`; None for any
        other expression."""
        part = self.tokens[start : self.position]
        if len(part) <= 2 and part and part[-1].kind == "number" and "." in part[-1].text:
            mantissa, _, exponent = part[-1].text.lower().partition("e")
            return len(mantissa.partition(".")[2]) - int(exponent or 0)
        match = SCIENTIFIC.fullmatch("".join(token.text for token in part)) if len(part) <= 9 else None
        return None if match is None else len(match[1]) - int(match[2] or 0)

    def with_unit(self, value: sympy.Expr, decimals: int | None, digits: str) -> Scalar:
        """The scalar with the percent sign, degree sign or unit that follows it."""
        if self.take("%") or (self.next.kind == "word" and self.next.text.lower() in PERCENT):
            if self.next.kind == "word" and self.next.text.lower() in PERCENT:
                self.position += 1
            return Scalar(value, decimals, percent=True)
        if degrees := self._degrees():
            self.position += degrees
            if self.next.kind in ("letter", "word") and self.next.text in TEMPERATURES:
                self.position += 1
                return Scalar(value, decimals, unit=Unit(words=(TEMPERATURES[self.tokens[self.position - 1].text],)))
            minutes = self._parts_of_a_degree()
            return Scalar(value + minutes, None if minutes else decimals, unit=unit_of("degree"))
        words = self._words_ahead()
        if words[:2] == ["per", "cent"]:
            self.position += 2
            return Scalar(value, decimals, percent=True)
        if self.take("permille") or PER_MILLE.match(" ".join(words)):
            self.position += len(words)
            return Scalar(checked(value / 1000), stated=value)
        stated = None
        while self.next.kind == "word" and (scale := _scale(self.next.text)) is not None:
            if stated is None and self.next.text.lower() in SCALES.keys() - PLACES.keys():
                stated = value
            value, decimals = value * sympy.Rational(scale), None
            self.position += 1
        if self.next.kind == "word" and self.next.text.lower() in RAISED and self.peek(1).kind != "word":
            if digits != "plain" or value.is_negative or stated is not None:
                raise Unreadable("ambiguous power")
            stated, value, decimals = value, power(value, sympy.Integer(RAISED[self.next.text.lower()])), None
            self.position += 1
        unit = self._unit()
        while unit is not None and (smaller := self._smaller(unit)) is not None:
            value, decimals, digits = value + smaller, None, ""
        return Scalar(value, decimals, unit=unit, digits=digits, stated=stated)

    def _smaller(self, unit: Unit) -> sympy.Expr | None:
        """The `30 minutes` of "1 hour 30 minutes", in the larger unit; None where no such quantity follows."""
        start = self.position
        if self.next.kind == "join" and self.next.text == "and":
            self.position += 1
        if self.next.kind == "number" and self.peek(1).kind == "word":
            amount = sympy.Rational(Fraction(self.next.text))
            self.position += 1
            other = self._unit()
            if other is not None and other.dimensions == unit.dimensions and other.factor < unit.factor:
                return amount * sympy.Rational(other.factor / unit.factor)
        self.position = start
        return None

    def _parts_of_a_degree(self) -> sympy.Expr:
        """The minutes and seconds of an angle: `30'15''`."""
        total = sympy.S.Zero
        if self.next.kind == "number" and self.peek(1).text == "'" and self.peek(2).text != "'":
            total += sympy.Rational(Fraction(self.next.text)) / 60
            self.position += 2
            if self.next.kind == "number" and self.peek(1).text == self.peek(2).text == "'":
                total += sympy.Rational(Fraction(self.next.text)) / 3600
                self.position += 3
        return total

    def _unit(self) -> Unit | None:
        """Words and their powers after a number; None where none follow. Errors: Unreadable where they change it."""
        unit, exponent, pending, seen = Unit(), 1, 1, False
        while self.next.kind in ("word", "operator"):
            text = self.next.text
            follows = self.peek(1).kind == "word"
            if self.next.kind == "word":
                if self._answers():
                    break
                self._refuse_statement(unit == Unit())
                self.position, seen = self.position + 1, True
                if text.lower() in ("per", "a", "an", "each") and follows:
                    exponent = -1 if text.lower() == "per" else exponent
                    continue
                if text.lower() in POWERS | RAISED and follows:
                    pending = (POWERS | RAISED)[text.lower()]
                    continue
                if text.lower() in ("th", "of", "the"):
                    continue
                own = self._unit_power() if self.next.text == "^" else RAISED.get(self.next.text.lower(), 1)
                self.position += self.next.text.lower() in RAISED
                if own < 0 and text in PRODUCTS:
                    unit = unit.times(Unit(words=(text,)), exponent * pending * own)
                else:
                    unit = unit.times(word_unit(text), exponent * pending * own)
                pending = 1
            elif seen and text in ("/", "*") and (follows or self._letter_unit()):
                self.position += 1
                exponent = -1 if text == "/" else exponent
            else:
                break
        return unit if seen and unit != Unit() else None

    def _answers(self) -> bool:
        """Consume words that say that the number is the answer."""
        words = self._words_ahead()
        if not ANSWERED.fullmatch(" ".join(words)):
            return False
        self.position += len(words)
        return True

    def _words_ahead(self) -> list[str]:
        """The words that follow, in lower case."""
        words: list[str] = []
        while self.peek(len(words)).kind == "word":
            words.append(self.peek(len(words)).text.lower())
        return words

    def _letter_unit(self) -> bool:
        """Make the letter after the next token a word if it is a unit: the metre of `\\text{N}\\cdot\\text{m}`."""
        letter = self.peek(1)
        if letter.kind != "letter" or letter.subscript or unit_of(letter.text) is None:
            return False
        self.tokens[self.position + 1] = Token("word", letter.text, letter.spaced)
        return True

    def _refuse_statement(self, first: bool) -> None:
        """Errors: Unreadable if the next word says something about the number or changes it: no unit. first: whether
        nothing was counted yet."""
        word, last = self.next.text.lower(), self.peek(1).kind != "word"
        if word in STATEMENTS or (last and word in JUDGED) or (first and word in OF_THE_NUMBER):
            raise Unreadable("words that change the number")
        words = " ".join(self._words_ahead())
        if CHANGES.match(words) or (first and REJECTED.match(words)):
            raise Unreadable("words that change the number")

    def _unit_power(self) -> int:
        self.expect("^")
        exponent = self._exponent()
        if not (exponent.is_Integer and abs(exponent) <= 9):
            raise Unreadable("not parseable")
        return int(exponent)


def _scale(word: str) -> Fraction | None:
    """What a word multiplies the number before it by; None for any other word."""
    factor = SCALES.get(word.lower(), SHORT_PLACES.get(word if len(word) == 1 else word.lower()))
    return None if factor is None else Fraction(factor)
