"""Units of measure: their names, dimensions and exact factors, so that `5 cm` is not `5 m` and `500 cm` is.

Own table and no library: pint converts in floating point and knows nothing of dozens and dollars, and sympy's physics
module reads no names. Words that are no unit ("apples") count for themselves.
"""

from dataclasses import dataclass
from fractions import Fraction

Dimensions = tuple[tuple[str, int], ...]  # sorted pairs of a base dimension and its exponent

_TABLE = """
length: m meter metre = 1; km kilometer kilometre = 1000; cm centimeter centimetre = 1/100; dm decimeter = 1/10
length: mm millimeter millimetre = 1/1000; um micrometer micron = 1/1000000; nm nanometer = 1/1000000000
length: in inch inches = 127/5000; ft foot feet = 381/1250; yd yard = 1143/1250; mi mile = 201168/125
mass: kg kilogram = 1; g gram = 1/1000; mg milligram = 1/1000000; ton tonne = 1000
mass: lb lbs pound = 45359237/100000000; oz ounce = 45359237/1600000000
time: s sec second = 1; min minute = 60; h hr hour = 3600; day = 86400; week = 604800; ms millisecond = 1/1000
money: dollar usd = 1; cent = 1/100
euro: euro eur = 1
sterling: gbp = 1
yen: yen jpy = 1
rupee: rupee inr = 1
angle: degree deg = 1; arcminute = 1/60; arcsecond = 1/3600
calendar: year yr = 1; month = 1/12
radian: radian rad = 1
resistance: ohm = 1
volume: L liter litre = 1/1000; ml mL milliliter millilitre = 1/1000000; gallon = 473176473/125000000000
energy: J joule = 1; kJ kilojoule = 1000; eV electronvolt = 1; cal calorie = 1; kcal = 1000
force: N newton = 1
power: W watt = 1; kW kilowatt = 1000
pressure: Pa pascal = 1; kPa kilopascal = 1000; atm = 101325
temperature: K kelvin = 1
current: A ampere amp = 1
voltage: V volt = 1
frequency: Hz hertz = 1; MHz megahertz = 1000000; kHz kilohertz = 1000; GHz gigahertz = 1000000000
amount: mol mole = 1
"""
SCALES = {
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12, "dozen": 12,
    "million dollars": 10**6,
}  # fmt: skip
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = {word: number for number, word in enumerate(_NUMBERS.split())}
PERCENT = {"percent", "percentage", "pct", "percentages", "percents"}
COMPOUND = {"mph": {"mile": 1, "hour": -1}, "kph": {"km": 1, "h": -1}, "km/h": {"km": 1, "h": -1}}
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_VOLUME = (("length", 3),)


@dataclass(frozen=True)
class Unit:
    """A product of powers of units. words: those that are no unit of measure, sorted."""

    factor: Fraction = Fraction(1)
    dimensions: Dimensions = ()
    words: tuple[str, ...] = ()

    def times(self, other: "Unit", exponent: int = 1) -> "Unit":
        """The product with a power of another unit."""
        dimensions = dict(self.dimensions)
        for dimension, power in other.dimensions:
            dimensions[dimension] = dimensions.get(dimension, 0) + power * exponent
        words = self.words + tuple(word if exponent == 1 else f"{word}^{exponent}" for word in other.words)
        kept = tuple(sorted((dimension, power) for dimension, power in dimensions.items() if power))
        return Unit(self.factor * other.factor**exponent, kept, tuple(sorted(words)))


def _units() -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for line in _TABLE.strip().splitlines():
        dimension, _, entries = line.partition(": ")
        dimensions = _VOLUME if dimension == "volume" else ((dimension, 1),)
        for entry in entries.split("; "):
            names, _, factor = entry.partition(" = ")
            for name in names.split():
                table[name] = Unit(Fraction(factor), dimensions)
    return table


UNITS = _units()
SYMBOLS = {name for name in UNITS if len(name) >= 2}  # a single letter may be a variable


def unit_of(word: str) -> Unit | None:
    """The unit of measure that a word names, in singular or plural; None for any other word."""
    if word in COMPOUND:
        product = Unit()
        for name, exponent in COMPOUND[word].items():
            product = product.times(UNITS[name], exponent)
        return product
    lower = word.lower()
    for name in (word, lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in UNITS and not (len(name) == 1 and name != word):
            return UNITS[name]
    return None


def word_unit(word: str) -> Unit:
    """A word that counts things: apples, people."""
    return unit_of(word) or Unit(words=(word.lower().removesuffix("s"),))


def may_convert(value_ratio: Fraction, unit: Unit) -> bool:
    """Whether a ratio of two numbers may come from converting `unit` to another unit of the same dimension."""
    factors = {Fraction(1)}
    for dimension, power in unit.dimensions:
        same = [other.factor for other in UNITS.values() if other.dimensions in (((dimension, 1),), _VOLUME)]
        factors = {factor * (a / b) ** power for factor in factors for a in same for b in same}
        if len(factors) > 20_000:
            return True
    return value_ratio in factors
