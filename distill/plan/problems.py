"""How many problems and rows there are, as far as files on this machine say: a plan reads nothing of the hub."""

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill.prompts.rows import rows_of_file

if TYPE_CHECKING:
    from distill.recipe import BenchmarkCard, Eval
    from distill.recipe.sources import PromptSource


def rows_in(path: str, split: str | None = None, limit: int | None = None) -> int:
    """Rows of a file, at most `limit`. Errors: UserError where it cannot be read."""
    return sum(1 for _ in islice(rows_of_file(Path(path), split=split), limit))


def problems_of(card: "BenchmarkCard", settings: "Eval") -> int | None:
    """Problems of a benchmark that are asked, before any is left out by its date; None where nothing on this machine
    says it. Errors: UserError for a file that cannot be read."""
    given = settings.sources.get(card.name) or ()
    paths = (given,) if isinstance(given, str) else given
    if paths:
        counts: list[int | None] = [rows_in(path) for path in paths]
    elif card.problems is not None:
        counts = [card.problems]
    else:
        counts = [_in_source(source) for source in card.sources]
    known = [count for count in counts if count is not None]
    if len(known) < len(counts):
        return settings.limit
    return min(sum(known), settings.limit or sum(known))


def _in_source(source: "PromptSource") -> int | None:
    if source.kind == "file":
        return rows_in(source.path, source.split, source.limit)
    return source.limit
