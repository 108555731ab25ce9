"""Values between a program and its tests, as JSON: plain data only, and handles for everything else.

The receiver must be able to trust what it decodes to be plain: a result whose class says that it equals everything, or
an unpickled object with code of its own, would pass every test. So a value is sent as its exact built-in type (an
instance of a subclass as the type below it, a named tuple as one of a class made by the receiver), and anything that is
no plain data becomes a handle: a number by which the other side knows its object (`distill.grading.sandbox.peer`).

    null true 1 2.5 "text"     themselves, for None, bool, int, float and str
    ["l", …] ["t", …] ["s", …] ["z", …]      list, tuple, set, frozenset
    ["d", [key, value], …]                   dict; and so on, see `decode`
    ["h", number, kind]                      an object of the sender's: kind is `class`, `error` or a class's name
    ["o", number]                            an object of the receiver's

Rejected: pickle, also with a list of allowed classes (its BUILD instruction sets attributes of allowed classes, such as
`Counter.__eq__`), and marshal (loads of hostile bytes may crash the reader).
"""

import builtins
import datetime
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterable
from decimal import Decimal
from fractions import Fraction
from functools import cache
from types import BuiltinFunctionType
from typing import Protocol, cast

LONGEST = 64 << 20  # bytes of a message
EXACT = 1 << 53  # larger integers are sent as text, so that no JSON reader rounds them

Wire = None | bool | int | float | str | list["Wire"]


class TooLong(ValueError):
    """A message of more than `LONGEST` bytes."""


class Stream(Protocol):
    """The part of a socket that messages need."""

    def sendall(self, data: bytes, /) -> None:
        """Send all of it."""

    def recv(self, size: int, /) -> bytes:
        """Receive some bytes; none at the end."""


def send(stream: Stream, message: object) -> None:
    """Send a JSON value. Errors: OSError when the other side has gone."""
    data = json.dumps(message).encode()
    stream.sendall(struct.pack("!I", len(data)) + data)


def receive(stream: Stream) -> object:
    """The next JSON value. Errors: EOFError at the end, `TooLong`, ValueError for what is no message."""
    (size,) = struct.unpack("!I", _exactly(stream, 4))
    if size > LONGEST:
        raise TooLong(f"a message of {size:,} bytes")
    try:
        return json.loads(_exactly(stream, size))
    except RecursionError as error:
        raise ValueError("a message that is nested too deep") from error


def _exactly(stream: Stream, size: int) -> bytes:
    parts, left = list[bytes](), size
    while left:
        part = stream.recv(min(left, 1 << 20))
        if not part:
            raise EOFError("the other process has ended")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


# ---- encoding


def encode(value: object, handle: Callable[[object], Wire]) -> Wire:
    """A value for `send`. handle: encodes what is no plain data. Errors: RecursionError for data that holds itself."""
    if (fields := _fields(value)) and isinstance(value, tuple):
        items = vars(tuple)["__iter__"](value)
        return ["N", type(value).__name__, list(fields), *(encode(item, handle) for item in items)]
    value = _exact(value)
    kind = type(value)
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int):
        return value if -EXACT < value < EXACT else ["i", hex(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else ["f", repr(value)]
    if kind in _SEQUENCES and isinstance(value, Iterable):
        return [_SEQUENCES[kind], *(encode(item, handle) for item in value)]
    if kind in _MAPPINGS and isinstance(value, dict):
        return [_MAPPINGS[kind], *([encode(key, handle), encode(item, handle)] for key, item in value.items())]
    if kind in _VIEWS and isinstance(value, Iterable):
        return ["v", _VIEWS[kind], *(encode(item, handle) for item in value)]
    if isinstance(value, deque):
        return ["q", value.maxlen, *(encode(item, handle) for item in value)]
    return _scalar(value) or handle(value)


def _fields(value: object) -> tuple[str, ...]:
    """The names of the fields of a named tuple; none for anything else."""
    fields = vars(type(value)).get("_fields")
    if not (isinstance(value, tuple) and type(fields) is tuple and tuple.__len__(value) == len(fields)):
        return ()
    return fields if all(type(name) is str for name in fields) else ()


@cache
def _named(name: str, fields: tuple[str, ...]) -> Callable[..., object]:
    """A class of named tuples. Errors: ValueError for what is no name."""
    return namedtuple(name, fields)  # the names are known at run time only


def _scalar(value: object) -> Wire:
    """A value without parts of its own; None for anything else."""
    if isinstance(value, complex):
        return ["c", repr(value.real), repr(value.imag)]
    if isinstance(value, bytes | bytearray):
        return ["y" if isinstance(value, bytes) else "Y", value.hex()]
    if isinstance(value, range):
        return ["r", hex(value.start), hex(value.stop), hex(value.step)]
    if type(value) is Decimal:
        return ["D", str(value)]
    if type(value) is Fraction:
        return ["F", hex(value.numerator), hex(value.denominator)]
    if isinstance(value, datetime.date | datetime.time) and type(value) in _TIMES.values():
        return None if getattr(value, "tzinfo", None) else ["T", type(value).__name__, value.isoformat()]
    if isinstance(value, datetime.timedelta):
        return ["e", value.days, value.seconds, value.microseconds]
    if value is Ellipsis or value is NotImplemented:
        return ["n", "Ellipsis" if value is Ellipsis else "NotImplemented"]
    name = getattr(value, "__name__", None) if isinstance(value, type | BuiltinFunctionType) else None
    if isinstance(name, str) and vars(builtins).get(name) is value:
        return ["n", name]
    return None


_SEQUENCES: dict[type, str] = {list: "l", tuple: "t", set: "s", frozenset: "z"}
_MAPPINGS: dict[type, str] = {dict: "d", OrderedDict: "O", Counter: "C", defaultdict: "E"}
_VIEWS: dict[type, str] = {type({}.keys()): "keys", type({}.values()): "values", type({}.items()): "items"}
_BASES = (int, float, complex, str, bytes, tuple, list, set, frozenset, OrderedDict, Counter, defaultdict, dict)


def _exact(value: object) -> object:
    """The value as an instance of the plain type below its class; itself where it is plain already, or no data."""
    kind = type(value)
    if kind.__module__ == "numpy" and hasattr(value, "item") and getattr(value, "shape", None) == ():
        return value.item()
    if kind in (bool, *_BASES) or isinstance(value, type):
        return value
    for base in _BASES:
        if isinstance(value, base):
            return _plain(value, base)
    return value


def _plain(value: object, base: type) -> object:
    """The value as an exact `base`, by the methods of `base`: those of its class may say anything."""
    if issubclass(base, dict):
        return dict(dict.items(cast("dict[object, object]", value)))
    if base in (int, float, complex, str, bytes):
        return getattr(base, f"__{base.__name__}__")(value)
    return cast("Callable[[object], object]", base)(vars(base)["__iter__"](value))


# ---- decoding


def decode(data: object, handles: Callable[[str, list[object]], object]) -> object:
    """The value of what `encode` made. handles: the object of `["h", …]` or `["o", …]`.

    Errors: ValueError, TypeError, KeyError, IndexError, OverflowError or RecursionError for what `encode` never makes.
    """
    if not isinstance(data, list):
        if isinstance(data, dict):
            raise ValueError("no value")
        return data
    tag, *rest = data
    if tag in ("h", "o"):
        return handles(str(tag), rest)
    if tag in _BUILD:
        return _BUILD[str(tag)](decode(item, handles) for item in rest)
    if tag in _PAIRS:
        return _PAIRS[str(tag)]((decode(key, handles), decode(item, handles)) for key, item in rest)
    if tag == "v":
        return _view(str(rest[0]), [decode(item, handles) for item in rest[1:]])
    if tag == "N":
        names = tuple(str(name) for name in rest[1]) if isinstance(rest[1], list) else ()
        return _named(str(rest[0]), names)(*(decode(item, handles) for item in rest[2:]))
    if tag == "q":
        return deque((decode(item, handles) for item in rest[1:]), rest[0])
    return _decode_scalar(str(tag), rest)


def _decode_scalar(tag: str, rest: list[object]) -> object:
    texts = [str(item) for item in rest]
    match tag:
        case "i":
            return int(texts[0], 16)
        case "f":
            return float(texts[0])
        case "c":
            return complex(float(texts[0]), float(texts[1]))
        case "y" | "Y":
            return bytes.fromhex(texts[0]) if tag == "y" else bytearray.fromhex(texts[0])
        case "r":
            start, stop, step = (int(text, 16) for text in texts)
            return range(start, stop, step)
        case "D":
            return Decimal(texts[0])
        case "F":
            return Fraction(int(texts[0], 16), int(texts[1], 16))
        case "T":
            return _TIMES[texts[0]].fromisoformat(texts[1])
        case "e":
            days, seconds, microseconds = (int(text) for text in texts)
            return datetime.timedelta(days, seconds, microseconds)
        case "n":
            return getattr(builtins, texts[0])
    raise ValueError(f"no value: {tag!r}")


def _view(kind: str, items: list[object]) -> object:
    if kind == "keys":
        return dict.fromkeys(items).keys()
    if kind == "values":
        return dict(enumerate(items)).values()
    return dict(item for item in items if isinstance(item, tuple) and len(item) == 2).items()


_BUILD: dict[str, Callable[[Iterable[object]], object]] = {"l": list, "t": tuple, "s": set, "z": frozenset}
_PAIRS: dict[str, Callable[[Iterable[tuple[object, object]]], object]] = {
    "d": dict,
    "O": OrderedDict,
    "C": lambda pairs: Counter(dict(pairs)),
    "E": lambda pairs: defaultdict(None, pairs),
}
_TIMES: dict[str, type[datetime.date] | type[datetime.time]] = {
    "date": datetime.date,
    "time": datetime.time,
    "datetime": datetime.datetime,
}
