"""Values and what separates them → a list, in which the values of one solution stay together.

In `x = 1, y = 4 or x = 3, y = 2` the word separates two solutions, and the commas the values of each. A flat list of
all four would be that of the solutions x = 1, y = 2 and x = 3, y = 4, too.
"""

from dataclasses import replace

import sympy

from distill.grading.math.values import Labelled, Region, Scalar, Sequence, Value

Piece = tuple[str, Value]  # what separates a value from the one before: "or", ";", "and" or ","; and the value
LOOSEST = ("or", ";", "and", ",")


def loosest(separators: list[str]) -> str:
    """Of several separators in a row the one that joins least: ", or" is "or"."""
    return min(separators, key=LOOSEST.index)


def listed(pieces: list[Piece], brackets: str = "") -> Value:
    """The value, or the list of values. A list within it that has no brackets, such as a system, is a part of it."""
    if len(pieces) == 1 and (brackets == "" or not _is_bare(pieces[0][1])):
        return Sequence((pieces[0][1],), brackets) if brackets else pieces[0][1]
    flat: list[Piece] = []
    for separator, value in pieces:
        if isinstance(value, Sequence) and value.brackets == "":
            inner = "or" if value.alternatives else "and" if value.both else ","
            flat += [(inner if i else separator, item) for i, item in enumerate(value.items)]
        else:
            flat.append((separator, value))
    flat = _common(flat)
    separators = {separator for separator, _ in flat[1:]}
    groups = None if brackets else _groups(flat)
    items = groups or tuple(value for _, value in flat)
    if len(items) == 1 and not brackets:
        return items[0]
    both = "and" in separators and "or" not in separators
    return Sequence(items, brackets, "or" in separators, both, grouped=groups is not None)


def ungrouped(sequence: Sequence) -> Sequence:
    """The list without its groups."""
    if not sequence.grouped:
        return sequence
    items = tuple(item for group in sequence.items if isinstance(group, Sequence) for item in group.items)
    return replace(sequence, items=items, grouped=False)


def base_name(label: str) -> str:
    """The label without its subscript: that of `x_1` and `x_2` is one."""
    return label.partition("_")[0]


def distinct_labels(sequence: Sequence) -> tuple[str, ...]:
    """The labels of a sequence whose items have different ones; none for any other."""
    labels = tuple(item.label for item in sequence.items if isinstance(item, Labelled))
    return labels if len(labels) == len(sequence.items) == len(set(labels)) > 1 else ()


def sorted_labels(sequence: Sequence) -> bool:
    """Whether the order of the items is that of a point: they have no labels, `(y, x) = …` or alphabetical ones."""
    labels = distinct_labels(sequence)
    return sequence.brackets != "" or list(labels) == sorted(labels, key=str.casefold)


def unlabelled(sequence: Sequence) -> Sequence:
    """The list without the labels of its items."""
    items = tuple(item.value if isinstance(item, Labelled) else item for item in sequence.items)
    return Sequence(items, sequence.brackets, sequence.alternatives)


def enumerates(sequence: Sequence) -> bool:
    """Whether a list without brackets says that its items are solutions: `x = 1, x = 2`, `1 or 2`, `n = 1, 2`."""
    labels = {item.label for item in sequence.items if isinstance(item, Labelled)}
    return sequence.alternatives or len(labels) == 1


def _is_bare(value: Value) -> bool:
    return isinstance(value, Sequence) and value.brackets == ""


def _split(pieces: list[Piece], separators: set[str]) -> list[list[Piece]]:
    groups: list[list[Piece]] = []
    for i, piece in enumerate(pieces):
        if i == 0 or piece[0] in separators:
            groups.append([])
        groups[-1].append(piece)
    return groups


def _groups(pieces: list[Piece]) -> tuple[Value, ...] | None:
    """The solutions of several unknowns each; None where the list has no such structure."""
    for separators in ({"or"}, {"or", ";"}, {"or", ";", "and"}):
        groups = _split(pieces, separators)
        if len(groups) == 1 or len({len(group) for group in groups}) != 1 or len(groups[0]) == 1:
            continue
        values = [tuple(value for _, value in group) for group in groups]
        if solutions := _solutions(values):
            return solutions
        commas = all(separator == "," for group in groups for separator, _ in group[1:])
        if "and" not in separators and commas and all(isinstance(v, Scalar) for group in values for v in group):
            return tuple(Sequence(group, "()") for group in values)
    labels = [value.label for _, value in pieces if isinstance(value, Labelled)]
    period = len(set(labels))
    if len(labels) == len(pieces) and 1 < period < len(labels) and len(labels) % period == 0:
        return _solutions([tuple(v for _, v in pieces[i : i + period]) for i in range(0, len(pieces), period)])
    return None


def _solutions(groups: list[tuple[Value, ...]]) -> tuple[Value, ...] | None:
    """The groups as lists, where each gives values to the same names, at least two; their subscripts, which may number
    the solutions (`x_1, y_1; x_2, y_2`), are removed."""
    labelled = [
        tuple(replace(v, label=base_name(v.label)) for v in group if isinstance(v, Labelled)) for group in groups
    ]
    names = {frozenset(value.label for value in group) for group in labelled}
    if len(names) != 1 or len(*names) == 1 or any(len(group) != len(*names) for group in groups):
        return None
    return tuple(map(Sequence, labelled))


def _common(pieces: list[Piece]) -> list[Piece]:
    """`x > 1 and x < 3 or x > 5`: inequalities that "and" joins beside "or" as one set."""
    if not {"and", "or"} <= {separator for separator, _ in pieces[1:]}:
        return pieces
    found: list[Piece] = []
    for group in _split(pieces, {"or", ";", ","}):
        regions = [value for _, value in group if isinstance(value, Region) and value.variable is not None]
        points = sympy.Intersection(*(region.points for region in regions))
        if len(group) == 1 or len({region.variable for region in regions}) != 1 or len(regions) != len(group):
            found += group
        elif points is sympy.S.EmptySet:
            return pieces
        else:
            found.append((group[0][0], Region(points, regions[0].variable)))
    return found
