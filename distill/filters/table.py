"""The judged traces of one pass, in a scratch database on the disk: by position in the store, and by prompt.

Traces are stored in the order in which they were finished, and filters that compare traces want them by prompt: SQLite
sorts them on the disk, with a fixed cache. The database is made anew in every pass from the ledger of verdicts, which
is what survives a crash (a database that a killed process leaves may be damaged in ways that go unnoticed); so it needs
no journal, no fsync and no lock, and works on network file systems.

Rejected: an index of 24 bytes a trace in memory with reads from the ledger by offset (as fast, but verdicts that later
filters add need a second file and a merge of their own), sorted runs in plain files (the same merge, written by hand),
and a database as the only record (no checksums).
"""

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from distill.filters.judged import Judged, Key
from distill.traces.trace import Verdict

SCHEMA = """
    PRAGMA journal_mode = OFF;
    PRAGMA synchronous = OFF;
    PRAGMA temp_store = FILE;
    PRAGMA cache_size = -8192; -- KiB
    CREATE TABLE earlier (
        prompt TEXT, sample INTEGER, digest TEXT, row TEXT, PRIMARY KEY (prompt, sample)
    ) WITHOUT ROWID;
    CREATE TABLE judged (position INTEGER PRIMARY KEY, prompt TEXT, sample INTEGER, kept INTEGER, row TEXT);
    CREATE TABLE choices (
        position INTEGER, step INTEGER, keep INTEGER, verdict TEXT, PRIMARY KEY (position, step)
    ) WITHOUT ROWID;
"""


class Placed(NamedTuple):
    """A judged trace, and its position in the store."""

    position: int
    judged: Judged


class JudgedTable:
    """Judged traces on the disk; a context manager, which deletes the database. path: its file; replaced if there.

    steps: the number of choosing filters that have chosen so far.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.steps = 0

    def __enter__(self) -> "JudgedTable":
        self.path.unlink(missing_ok=True)
        self._database = sqlite3.connect(f"{self.path.absolute().as_uri()}?nolock=1", uri=True, isolation_level=None)
        self._database.executescript(SCHEMA)
        self._database.execute("BEGIN")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._database.close()
        self.path.unlink()

    # ---- each trace by itself

    def remember(self, judged: Judged) -> None:
        """Add what an earlier session judged. Of two rows for a trace the later one counts."""
        self._database.execute(
            "INSERT OR REPLACE INTO earlier VALUES (?, ?, ?, ?)",
            (*judged.key, judged.digest, json.dumps(judged.to_row())),
        )

    def recall(self, key: Key, digest: str) -> Judged | None:
        """What an earlier session judged of this trace with this text, if it did."""
        query = "SELECT row FROM earlier WHERE prompt = ? AND sample = ? AND digest = ?"
        found = self._database.execute(query, (*key, digest)).fetchone()
        return None if found is None else _judged(found[0])

    def add(self, position: int, judged: Judged) -> None:
        """Add a judged trace at its position in the store, in any order."""
        row = json.dumps(judged.to_row())
        self._database.execute("INSERT INTO judged VALUES (?, ?, ?, ?, ?)", (position, *judged.key, judged.kept, row))

    def arrange(self) -> None:
        """Prepare reading by prompt: after the last `add`."""
        self._database.execute("CREATE UNIQUE INDEX by_prompt ON judged (prompt, sample)")

    # ---- traces together

    def prompts(self) -> Iterator[list[Placed]]:
        """The traces of one prompt after the other, each in order of their sample numbers."""
        query = "SELECT position, prompt, row FROM judged ORDER BY prompt, sample"
        for _, rows in groupby(self._database.execute(query), key=itemgetter(1)):
            yield [Placed(position, self._chosen(position, _judged(row))) for position, _, row in rows]

    def survivors(self) -> Iterator[Judged]:
        """The traces that no filter has dropped, in order of (prompt id, sample)."""
        query = "SELECT position, row FROM judged WHERE kept ORDER BY prompt, sample"
        for position, row in self._database.execute(query):
            yield self._chosen(position, _judged(row))

    def survivor_count(self) -> int:
        """The number of traces that no filter has dropped."""
        (count,) = self._database.execute("SELECT count(*) FROM judged WHERE kept").fetchone()
        return int(count)

    def prompt_counts(self) -> tuple[int, int]:
        """The number of prompts, and of those with a trace that no filter has dropped."""
        query = "SELECT count(*), coalesce(sum(kept), 0) FROM (SELECT max(kept) AS kept FROM judged GROUP BY prompt)"
        prompts, kept = self._database.execute(query).fetchone()
        return int(prompts), int(kept)

    def position(self, key: Key) -> int:
        """The position of a trace in the store."""
        query = "SELECT position FROM judged WHERE prompt = ? AND sample = ?"
        (position,) = self._database.execute(query, key).fetchone()
        return int(position)

    def choose(self, verdicts: Iterable[tuple[int, Sequence[Verdict]]], filters: int) -> None:
        """Record (position, verdicts) of the next `filters` choosing filters, in their order, of traces."""
        for position, new in verdicts:
            for step, verdict in enumerate(new, self.steps):
                row = json.dumps(verdict.to_dict())
                self._database.execute("INSERT INTO choices VALUES (?, ?, ?, ?)", (position, step, verdict.keep, row))
        dropped = "SELECT position FROM choices WHERE step >= ? AND NOT keep"
        self._database.execute(f"UPDATE judged SET kept = FALSE WHERE position IN ({dropped})", (self.steps,))
        self.steps += filters

    # ---- all of them

    def __iter__(self) -> Iterator[Judged]:
        """Every trace with all its verdicts, in the store's order."""
        for position, row in self._database.execute("SELECT position, row FROM judged ORDER BY position"):
            yield self._chosen(position, _judged(row))

    def _chosen(self, position: int, judged: Judged) -> Judged:
        """The trace with the verdicts of the filters that have chosen."""
        if not self.steps:
            return judged
        query = "SELECT verdict FROM choices WHERE position = ? AND step < ? ORDER BY step"
        chosen = self._database.execute(query, (position, self.steps))
        return replace(judged, verdicts=[*judged.verdicts, *(Verdict(**json.loads(verdict)) for (verdict,) in chosen)])


def _judged(row: str) -> Judged:
    judged = Judged.from_row(json.loads(row))
    assert judged is not None, "this process wrote the row"
    return judged


class Survivors:
    """What a `CorpusFilter` sees: the traces of a table that no filter has dropped. scratch: an empty directory."""

    def __init__(self, table: JudgedTable, scratch: Path) -> None:
        self._table, self.scratch = table, scratch

    def __len__(self) -> int:
        return self._table.survivor_count()

    def __iter__(self) -> Iterator[Judged]:
        return self._table.survivors()
