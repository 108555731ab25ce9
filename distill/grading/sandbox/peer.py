"""Calls between the process of an answer and the process of its tests.

The tests of a function and the function must not share a process: code there can end it with success, replace what
compares, read what is expected. So the answer serves its names from a process of its own, and the tests see proxies:
a call sends the arguments and brings back plain data (`distill.grading.sandbox.wire`) or, for an object of the answer's
own class, a `Remote`. Lists and other containers that the answer changed in place are changed in the tests as well.

What a `Remote` does is decided by the answer's code, so nothing is left to it that would decide a test: compared with
plain data it is unequal and unordered, it has no arithmetic with plain data, and `in` compares element by element.
Among objects of the answer (`Vector(1, 2) + Vector(3, 4) == Vector(4, 6)`) its own operators count, as the test says.
In the other direction the answer may call functions that a test passed, and nothing else.
"""

import builtins
import operator
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from types import ModuleType

from distill.grading.sandbox.wire import Stream, TooLong, Wire, decode, encode, receive, send

OPERATIONS: Mapping[str, Callable[..., object]] = {
    "call": lambda function, /, *args, **names: function(*args, **names),
    "get": getattr,
    "set": setattr,
    "del": delattr,
    "iter": iter,
    "next": next,
    "len": len,
    "item": operator.getitem,
    "put": operator.setitem,
    "remove": operator.delitem,
    "bool": bool,
    "hash": hash,
    "str": str,
    "repr": repr,
    "int": int,
    "float": float,
    "isinstance": lambda kind, value: isinstance(value, kind),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value: type(value).__exit__(value, None, None, None),
    **{name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge", "add", "sub", "mul", "truediv")},
    **{name: getattr(operator, name) for name in ("floordiv", "mod", "pow", "and_", "or_", "xor", "neg", "matmul")},
}
FOR_ANSWERS = frozenset(("call", "iter", "next"))  # what the answer may do with what a test passed to it
CONTAINERS = (list, dict, set, deque, bytearray)


class AnswerError(Exception):
    """An exception of a class that the answer defined."""


class Ended(BaseException):
    """The other process has ended, or sent what is no message."""


class Peer:
    """One end of the channel. allowed: what the other end may ask for. calls: how often this end called the other.
    ended: why no more is read from the other end: `ended early` or `output limit`; empty before."""

    def __init__(self, stream: Stream, allowed: frozenset[str]) -> None:
        self.stream, self.allowed = stream, allowed
        self.objects: list[object] = []
        self.numbers: dict[int, int] = {}
        self.remotes: dict[int, Remote | type[Exception]] = {}
        self.calls = 0
        self.ended = ""

    # ---- asking

    def ask(self, operation: str, /, *operands: object, **keywords: object) -> object:
        """Have the other side perform an operation of `OPERATIONS`. Raises what it raised, `Ended` when it is gone."""
        self.calls += operation == "call"
        arguments = [self._encode(operand) for operand in operands]
        names = {name: self._encode(value) for name, value in keywords.items()}
        self._send(["ask", operation, arguments, names])
        kind, *rest = self._answer()
        try:
            if kind == "error":
                raise self._error(rest)
            for index, data in _pairs(rest[1]):
                given = keywords[index] if isinstance(index, str) else operands[int(str(index))]
                _copy(self._decode(data), given)
            return self._decode(rest[0])
        except (ValueError, TypeError, KeyError, IndexError, OverflowError, RecursionError) as error:
            if kind == "error":
                raise
            self._end()
            raise Ended(str(error)) from error

    def _answer(self) -> list[object]:
        """The reply to the last question; questions of the other side before it are answered."""
        while True:
            message = self._receive()
            if message[0] != "ask":
                return message
            self.reply(message)

    # ---- answering

    def serve(self) -> None:
        """Answer until the other side ends."""
        while True:
            try:
                message = self._receive()
            except Ended:
                return
            self.reply(message)

    def reply(self, message: Sequence[object]) -> None:
        """Perform what an `ask` message says and send the result, or the exception."""
        try:
            _, operation, arguments, names = message
            assert isinstance(operation, str) and isinstance(arguments, list) and isinstance(names, dict)
            if operation not in self.allowed:
                raise PermissionError(f"{operation}: not for this side of a test")
            operands = [self._decode(argument) for argument in arguments]
            keywords = {str(name): self._decode(value) for name, value in names.items()}
            given = [*enumerate(operands), *keywords.items()]
            watched = [(key, value, self._encode(value)) for key, value in given if isinstance(value, CONTAINERS)]
            result = OPERATIONS[operation](*operands, **keywords)
            reply = ["ok", self._encode(result)]
            changed = [[key, after] for key, value, before in watched if (after := self._encode(value)) != before]
            self._send([*reply, changed])
        except Ended:
            raise
        except (KeyboardInterrupt, GeneratorExit, Exception) as error:
            self._send(["error", *self._described(error)])

    def _described(self, error: BaseException) -> list[Wire]:
        """An exception: the built-in class below it, the name of its own, its text."""
        base = next(kind for kind in type(error).__mro__ if getattr(builtins, kind.__name__, None) is kind)
        number = self._number(type(error)) if base is not type(error) else -1
        try:
            text = str(error)
        except Exception:  # its `__str__` is the answer's code; the exception itself is still reported
            text = ""
        return [base.__name__, type(error).__name__, number, text[:2000]]

    def _error(self, described: Sequence[object]) -> BaseException:
        base, name, number, text = described
        kind = getattr(builtins, str(base), None)
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            return AnswerError(f"{base}: {text}")
        if isinstance(number, int) and number >= 0:
            kind = self._error_class(number, str(name), kind)
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and the like want more than a text
            return AnswerError(f"{name}: {text}")

    def _error_class(self, number: int, name: str, base: type[Exception]) -> type[Exception]:
        above = (AnswerError,) if base is Exception else (base, AnswerError)
        known = self.remotes.setdefault(number, type(name, above, {}))
        return known if isinstance(known, type) else AnswerError

    # ---- values

    def _encode(self, value: object) -> Wire:
        return encode(value, self._handle)

    def _decode(self, data: object) -> object:
        return decode(data, self._object)

    def _handle(self, value: object) -> Wire:
        if isinstance(value, Remote):
            return ["o", object.__getattribute__(value, "_number")]
        if isinstance(value, type) and issubclass(value, AnswerError):
            return ["o", next(number for number, known in self.remotes.items() if known is value)]
        if isinstance(value, ModuleType):
            raise TypeError(f"a module cannot be passed: {value.__name__}")
        kind = type(value).__name__
        if isinstance(value, type) and issubclass(value, Exception):
            base = next(one for one in value.__mro__ if getattr(builtins, one.__name__, None) is one)
            kind = f"error {base.__name__} {value.__name__}"
        return ["h", self._number(value), kind]

    def _number(self, value: object) -> int:
        if id(value) not in self.numbers:
            self.numbers[id(value)] = len(self.objects)
            self.objects.append(value)  # kept, so that its id stays its own
        return self.numbers[id(value)]

    def _object(self, tag: str, rest: list[object]) -> object:
        number = int(str(rest[0]))
        if tag == "o":
            return self.objects[number]
        kind = str(rest[1])
        if number in self.remotes:
            return self.remotes[number]
        if kind.startswith("error "):
            _, base, name = kind.split(" ", 2)
            above = getattr(builtins, base)
            return self._error_class(number, name, above if issubclass(above, Exception) else Exception)
        self.remotes[number] = Remote(self, number, kind)
        return self.remotes[number]

    # ---- messages

    def _send(self, message: object) -> None:
        try:
            send(self.stream, message)
        except OSError as error:
            self._end()
            raise Ended("the other process has ended") from error

    def _receive(self) -> list[object]:
        try:
            message = receive(self.stream)
        except (OSError, EOFError, ValueError) as error:
            self._end("output limit" if isinstance(error, TooLong) else "ended early")
            raise Ended(str(error)) from error
        if not isinstance(message, list) or not message or self.ended:
            self._end()
            raise Ended("no message")
        return message

    def _end(self, reason: str = "ended early") -> None:
        self.ended = self.ended or reason


class Remote:
    """An object of the other process, see the module."""

    def __init__(self, peer: Peer, number: int, kind: str) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)
        object.__setattr__(self, "_kind", kind)

    def __call__(self, /, *args: object, **keywords: object) -> object:
        return _ask(self, "call", *args, **keywords)

    def __getattr__(self, name: str) -> object:
        if name.startswith("__") and name not in ("__name__", "__doc__"):
            raise AttributeError(name)
        return _ask(self, "get", name)

    def __setattr__(self, name: str, value: object) -> None:
        _ask(self, "set", name, value)

    def __delattr__(self, name: str) -> None:
        _ask(self, "del", name)

    def __iter__(self) -> "Iterator[object]":
        iterator = _ask(self, "iter")
        return iterator if isinstance(iterator, Remote) else iter(iterator)  # type: ignore[call-overload]  # a list

    def __next__(self) -> object:
        return _ask(self, "next")

    def __len__(self) -> int:
        return int(str(_ask(self, "len")))

    def __getitem__(self, key: object) -> object:
        return _ask(self, "item", key)

    def __setitem__(self, key: object, value: object) -> None:
        _ask(self, "put", key, value)

    def __delitem__(self, key: object) -> None:
        _ask(self, "remove", key)

    def __bool__(self) -> bool:
        return _ask(self, "bool") is True

    def __hash__(self) -> int:
        value = _ask(self, "hash")
        return value if isinstance(value, int) else 0

    def __int__(self) -> int:
        value = _ask(self, "int")
        return value if isinstance(value, int) else int(str(value))

    def __float__(self) -> float:
        value = _ask(self, "float")
        return value if isinstance(value, float) else float(str(value))

    def __str__(self) -> str:
        return str(_ask(self, "str"))

    def __repr__(self) -> str:
        return str(_ask(self, "repr"))

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Remote) and _ask(self, "isinstance", value) is True

    def __neg__(self) -> object:
        return _ask(self, "neg")

    def __enter__(self) -> object:
        return _ask(self, "enter")

    def __exit__(self, *exc: object) -> None:
        _ask(self, "exit")

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Remote) and _ask(self, "eq", other) is True)

    def __ne__(self, other: object) -> bool:
        return not self == other


def _ask(remote: Remote, operation: str, /, *operands: object, **keywords: object) -> object:
    peer = object.__getattribute__(remote, "_peer")
    assert isinstance(peer, Peer)
    return peer.ask(operation, remote, *operands, **keywords)


def _among(name: str) -> Callable[[Remote, object], object]:
    """A binary operator that counts among objects of the other process only."""

    def operate(self: Remote, other: object) -> object:
        return _ask(self, name, other) if isinstance(other, Remote) else NotImplemented

    return operate


for _name in ("lt", "le", "gt", "ge", "add", "sub", "mul", "truediv", "floordiv", "mod", "xor", "matmul"):
    setattr(Remote, f"__{_name}__", _among(_name))
for _name in ("and", "or"):
    setattr(Remote, f"__{_name}__", _among(f"{_name}_"))


def _pairs(value: object) -> Iterator[tuple[object, object]]:
    for pair in value if isinstance(value, list) else ():
        key, data = pair
        yield key, data


def _copy(source: object, target: object) -> None:
    """Make a container equal to what the other process has made of it, inner containers in place where they match."""
    if isinstance(target, list | deque) and isinstance(source, list | deque):
        _copy_items(list(source), target)
    elif isinstance(target, dict) and isinstance(source, dict):
        inner = {key: target.get(key) for key in source}
        target.clear()
        for key, value in source.items():
            target[key] = _merged(value, inner[key])
    elif isinstance(target, set) and isinstance(source, set):
        target.clear()
        target |= source
    elif isinstance(target, bytearray) and isinstance(source, bytearray):
        target[:] = source


def _copy_items(source: list[object], target: MutableSequence[object]) -> None:
    inner = list(target) if len(target) == len(source) else [None] * len(source)
    target.clear()
    target.extend(_merged(value, old) for value, old in zip(source, inner, strict=True))


def _merged(value: object, old: object) -> object:
    if isinstance(old, CONTAINERS) and type(old) is type(value):
        _copy(value, old)
        return old
    return value
