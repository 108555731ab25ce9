"""YAML in and out: PyYAML, bounded, without its surprises.

What differs from `yaml.safe_load`:

- `1e-5` is a number (YAML 1.1 reads text), and a date is text (YAML 1.1 makes an object of it that JSON does not know).
- A key that is written twice is an error (PyYAML keeps the last without a word), and so is a key that is not text.
- Tags are only those of JSON's values. `!!timestamp foo`, `!!set` and the like are refused.
- Size, depth, digits and the number of values are bounded (`distill.limits`) before anything is built: the syntax tree
  shares what an alias repeats, so 10^9 values behind nine lines of aliases are counted, not made.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from distill.errors import UserError
from distill.limits import YAML_BYTES, YAML_DEPTH, YAML_DIGITS, YAML_NODES

Value = None | bool | int | float | str | Sequence["Value"] | Mapping[str, "Value"]

TAG = "tag:yaml.org,2002:"
TAGS = {f"{TAG}{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map", "merge")}
NUMBERS = (f"{TAG}int", f"{TAG}float")


class _Error(yaml.constructor.ConstructorError):
    """A problem at a place in the text."""

    def __init__(self, problem: str, mark: yaml.Mark) -> None:
        super().__init__(None, None, problem, mark)


class _Loader(yaml.SafeLoader):
    """See the module. `get_single_data` is the entry; a problem is a `yaml.YAMLError` with its place."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.depth == YAML_DEPTH:
            raise _Error(f"values are nested more than {YAML_DEPTH} deep", self._mark())
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def _mark(self) -> yaml.Mark:
        mark: yaml.Mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]  # untyped in PyYAML's stubs
        return mark

    def get_single_data(self) -> Value:
        node = self.get_single_node()
        if node is None:
            return None
        _counted(node, {}, set())
        value: Value = self.construct_document(node)
        return value

    def construct_object(self, node: yaml.Node, deep: bool = False) -> object:
        if node.tag not in TAGS:
            name = node.tag.removeprefix(TAG)
            raise _Error(f"the tag !!{name} is not supported; write the value without it", node.start_mark)
        if node.tag in NUMBERS and len(node.value) > YAML_DIGITS:
            raise _Error(f"a number of {len(node.value):,} characters; at most {YAML_DIGITS} are read", node.start_mark)
        try:
            return super().construct_object(node, deep)
        except (ValueError, KeyError, OverflowError):  # `!!int foo`, `!!bool foo`
            raise _Error(f"{node.value!r} is not of type {node.tag.removeprefix(TAG)}", node.start_mark) from None

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = set()
        for key, _ in node.value:
            if key.tag == f"{TAG}merge":
                continue
            if key.tag != f"{TAG}str":
                shown = key.value if isinstance(key, yaml.ScalarNode) else key.id
                raise _Error(f"the key {shown} is not text; put it in quotes", key.start_mark)
            if key.value in keys:
                raise _Error(f"duplicate key {key.value!r}", key.start_mark)
            keys.add(key.value)
        mapping: dict[object, object] = super().construct_mapping(node, deep)
        return mapping


def _counted(node: yaml.Node, sizes: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for, aliases written out. Depth was bounded when the tree was composed."""
    if isinstance(node, yaml.ScalarNode):
        return 1
    if id(node) in above:
        raise _Error("an alias (*name) contains itself; write the value out", node.start_mark)
    if id(node) not in sizes:
        above.add(id(node))
        children = node.value if isinstance(node, yaml.SequenceNode) else [n for pair in node.value for n in pair]
        sizes[id(node)] = 1 + sum(_counted(child, sizes, above) for child in children)
        above.remove(id(node))
        if sizes[id(node)] > YAML_NODES:
            raise _Error(f"more than {YAML_NODES:,} values, aliases written out", node.start_mark)
    return sizes[id(node)]


class _Dumper(yaml.SafeDumper):
    """Quotes a string that `_Loader` would take for a number, or that holds Unicode's own line ends."""


def _text_node(dumper: _Dumper, text: str) -> yaml.ScalarNode:
    bare = not re.search("[\x85\u2028\u2029]", text)  # PyYAML would read these back as a newline
    return dumper.represent_scalar(f"{TAG}str", text, style=None if bare else '"')


_Dumper.add_representer(str, _text_node)

_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{TAG}timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        f"{TAG}float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
    )


def load_yaml(text: str, where: str) -> Value:
    """The value of a YAML text. Errors: UserError that begins with `where`, with line and column where it is known."""
    if len(text) > YAML_BYTES:
        raise UserError(f"{where}: {len(text):,} characters of YAML; at most {YAML_BYTES:,} are read")
    try:
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise UserError(f"{place}: not valid YAML: {one_line(error.problem or error.context)}") from None
    except yaml.YAMLError as error:  # characters that YAML does not allow: they have a position, not a line
        raise UserError(f"{where}: not valid YAML: {one_line(error)}") from None


def read_yaml(path: Path) -> Value:
    """The content of a YAML file. Errors: UserError with file and line when it is not YAML."""
    try:
        size = path.stat().st_size
        if size > YAML_BYTES:
            raise UserError(f"{path}: a file of {size:,} bytes; YAML files of at most {YAML_BYTES:,} are read")
        return load_yaml(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a UTF-8 text file (byte {error.start}): is this a YAML file?") from None


def dump_yaml(data: object) -> str:
    """YAML that `read_yaml` reads back as it was, keys in the order given."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


SHOWN = 300  # characters of a user's text in a message


def one_line(value: object) -> str:
    """The value's text on one line, cut where it is longer than `SHOWN` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
