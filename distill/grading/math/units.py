"""Units of measure: their names, dimensions and exact factors, so that `5 cm` is not `5 m` and `500 cm` is.

A joule is a newton metre: derived units have base dimensions (`_DERIVED`), so that one quantity is the same in any of
them. Case selects a prefix (mW, MW), so a name is read without its case only where no other prefix could be meant.

Own table and no library: pint converts in floating point and knows nothing of dozens and dollars, and sympy's physics
module reads no names. Words that are no unit ("apples") count for themselves.
"""

from dataclasses import dataclass
from fractions import Fraction

Dimensions = tuple[tuple[str, int], ...]  # sorted pairs of a base dimension and its exponent

_DERIVED = """
volume: length^3
area: length^2
force: mass length time^-2
energy: mass length^2 time^-2
power: mass length^2 time^-3
pressure: mass length^-1 time^-2
frequency: time^-1
charge: current time
voltage: mass length^2 time^-3 current^-1
resistance: mass length^2 time^-3 current^-2
capacitance: mass^-1 length^-2 time^4 current^2
flux: mass length^2 time^-2 current^-1
field: mass time^-2 current^-1
inductance: mass length^2 time^-2 current^-2
"""
_TABLE = """
length: m meter metre = 1; km kilometer kilometre = 1000; cm centimeter centimetre = 1/100; dm decimeter = 1/10
length: mm millimeter millimetre = 1/1000; um micrometer micron = 1/1000000; nm nanometer = 1/1000000000
length: in inch inches = 127/5000; ft foot feet = 381/1250; yd yard = 1143/1250; mi mile = 201168/125
area: acre = 4046.8564224; hectare = 10000
mass: kg kilogram = 1; g gram = 1/1000; mg milligram = 1/1000000; ton tonne = 1000
mass: lb lbs pound = 45359237/100000000; oz ounce = 45359237/1600000000
time: s sec second = 1; min minute = 60; h hr hour = 3600; day = 86400; week = 604800; ms millisecond = 1/1000
money: dollar usd = 1; cent = 1/100
euro: euro eur = 1
sterling: gbp = 1
yen: yen jpy = 1
rupee: rupee inr = 1
angle: degree deg = 1; arcminute = 1/60; arcsecond = 1/3600; revolution = 360
calendar: year yr = 1; month = 1/12; decade = 10; century centuries = 100
radian: radian rad = 1
resistance: ohm = 1
volume: L l liter litre = 1/1000; ml mL milliliter millilitre = 1/1000000; gallon = 473176473/125000000000
volume: quart = 473176473/500000000000; pint = 473176473/1000000000000; cup = 473176473/2000000000000
energy: J joule = 1; kJ kilojoule = 1000; eV electronvolt = 1.602176634e-19; cal calorie = 4.184; kcal = 4184
force: N newton = 1
power: W watt = 1; kW kilowatt = 1000
pressure: Pa pascal = 1; kPa kilopascal = 1000; atm = 101325
temperature: K kelvin = 1
current: A ampere amp = 1
voltage: V volt = 1
frequency: Hz hertz = 1; MHz megahertz = 1000000; kHz kilohertz = 1000; GHz gigahertz = 1000000000
amount: mol mole = 1
charge: C coulomb = 1
capacitance: F farad = 1
flux: Wb weber = 1
field: T tesla = 1
inductance: H henry henries = 1
"""
_PREFIXES = {
    "G": "1e9", "M": "1e6", "k": "1e3", "d": "1e-1", "c": "1e-2", "m": "1e-3", "u": "1e-6", "n": "1e-9", "p": "1e-12",
}  # fmt: skip
_PREFIXED = {  # prefixes → the symbols that they stand before; not pm, pH, kT, which mean something else
    "mu": "m g s L l J N W Pa Hz V A C F T H Wb eV ohm mol cal",
    "n": "m g s L J N W Pa V A C F T H eV mol",
    "p": "g s N W V A C F mol",
    "cd": "m g L l",
    "k": "m g L l J N W Pa Hz V A C eV ohm mol cal",
    "M": "m g s J N W Pa Hz V A C eV ohm cal",
    "G": "J N W Pa Hz V eV ohm",
}
_NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = {word: number for number, word in enumerate(_NUMBERS.split())}
TENS = {
    "twenty": 20, "thirty": 30, "forty": 40, "fifty": 50, "sixty": 60, "seventy": 70, "eighty": 80, "ninety": 90,
}  # fmt: skip
_ORDINALS = (
    "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth fifteenth "
    "sixteenth seventeenth eighteenth nineteenth"
)
ORDINALS = {word: number for number, word in enumerate(_ORDINALS.split(), 1)}
for _ten, _number in TENS.items():
    _ones = [(f"{_ten}-{_word}", _number + _one) for _word, _one in ORDINALS.items() if _one < 10]
    ORDINALS |= {f"{_ten[:-1]}ieth": _number} | dict(_ones)
PARTS = {"half": 2, "halves": 2, "quarter": 4, "quarters": 4}  # what a number of them is divided by
for _word, _number in (ORDINALS | {"hundredth": 100, "thousandth": 1000, "millionth": 10**6}).items():
    if _number > 2:  # seconds are units of time
        PARTS |= {_word: _number, f"{_word}s": _number}
PLACES: dict[str, int | Fraction] = {  # words that are part of a number
    "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "trillion": 10**12,
    "quadrillion": 10**15, "quintillion": 10**18, "lakh": 10**5, "lakhs": 10**5, "crore": 10**7, "crores": 10**7,
    "grand": 1000, "million dollars": 10**6,
}  # fmt: skip
SHORT_PLACES = {"k": 1000, "mn": 10**6, "mln": 10**6, "bn": 10**9, "tn": 10**12}  # as words: letters are variables
SCALES = PLACES | {  # words that multiply or divide the number before them, or are what it counts
    "tens": 10, "hundreds": 100, "thousands": 1000, "millions": 10**6, "billions": 10**9, "trillions": 10**12,
    "dozen": 12, "dozens": 12,
}  # fmt: skip
SCALES |= {word: Fraction(1, number) for word, number in PARTS.items()}
PERCENT = {"percent", "percentage", "pct", "percentages", "percents"}
COMPOUND = {
    "mph": {"mile": 1, "hour": -1}, "kph": {"km": 1, "h": -1}, "km/h": {"km": 1, "h": -1}, "Nm": {"N": 1, "m": 1},
    "Ns": {"N": 1, "s": 1}, "Wh": {"W": 1, "h": 1}, "kWh": {"kW": 1, "h": 1}, "kwh": {"kW": 1, "h": 1},
    "MWh": {"MW": 1, "h": 1}, "mAh": {"mA": 1, "h": 1},
}  # fmt: skip
POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}


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


def _dimensions() -> dict[str, Dimensions]:
    derived: dict[str, Dimensions] = {}
    for line in _DERIVED.strip().splitlines():
        name, _, product = line.partition(": ")
        pairs = (factor.partition("^") for factor in product.split())
        derived[name] = tuple(sorted((base, int(power or 1)) for base, _, power in pairs))
    return derived


DERIVED = _dimensions()


def _units() -> dict[str, Unit]:
    table: dict[str, Unit] = {}
    for line in _TABLE.strip().splitlines():
        dimension, _, entries = line.partition(": ")
        for entry in entries.split("; "):
            names, _, factor = entry.partition(" = ")
            for name in names.split():
                table[name] = Unit(Fraction(factor), DERIVED.get(dimension, ((dimension, 1),)))
    return table


UNITS = _units()
SYMBOLS = {name for name in UNITS if len(name) >= 2}  # a single letter may be a variable, two of them a product
CASED = {prefix + symbol for prefix in "mnp" for symbol in _PREFIXED["mu"].split()}  # another unit in another case
for _prefixes, _symbols in _PREFIXED.items():
    for _prefix in _prefixes:
        for _symbol in _symbols.split():
            UNITS.setdefault(_prefix + _symbol, Unit(Fraction(_PREFIXES[_prefix])).times(UNITS[_symbol]))
for _name, _product in COMPOUND.items():
    UNITS[_name] = Unit()
    for _part, _exponent in _product.items():
        UNITS[_name] = UNITS[_name].times(UNITS[_part], _exponent)


def unit_of(word: str) -> Unit | None:
    """The unit of measure that a word names, in singular or plural; None for any other word."""
    if word in UNITS:
        return UNITS[word]
    lower = word.lower()
    for name in (lower, lower.removesuffix("s"), lower.removesuffix("es")):
        if name in UNITS and len(name) > 1 and not (name in CASED and not word.startswith(name)):
            return UNITS[name]
    return None


def word_unit(word: str) -> Unit:
    """A word that counts things: apples, people. A short one with capitals may be a symbol, and keeps them: MB, Mb."""
    unit = unit_of(word)
    if unit is not None:
        return unit
    symbol = len(word) <= 4 and not (word.islower() or (len(word) >= 3 and word[1:].islower()))
    return Unit(words=(word if symbol else word.lower().removesuffix("s"),))


def may_convert(value_ratio: Fraction, unit: Unit) -> bool:
    """Whether a number in `unit` is another one in another unit of the same dimension. value_ratio: the first over the
    second."""
    wanted = value_ratio * unit.factor
    named = {other.factor for other in UNITS.values() if other.dimensions == unit.dimensions}
    if wanted in named:
        return True
    if named and len(unit.dimensions) > 2:  # of energy, force and so on, which have names of their own
        return False
    factors = {Fraction(1)}
    for dimension, power in unit.dimensions:
        same = {other.factor for other in UNITS.values() if other.dimensions == ((dimension, 1),)}
        factors = {factor * other**power for factor in factors for other in same}
        if len(factors) > 20_000:
            return True
    return wanted in factors
