"""What a run reads, counted: cards are parsed and weights hashed once, a finished run reads no trace."""

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from distill import catalog, models
from distill.catalog import load_recipe
from distill.pipeline import run_recipe
from distill.traces import store


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each card was parsed, each model's weights were hashed, each directory of traces was decoded."""
    seen: Counter[str] = Counter()

    def counted(owner: Any, name: str, label: str, place: int) -> None:
        function = getattr(owner, name)

        def counting(*arguments: Any, **keywords: Any) -> Any:
            seen[f"{label} {arguments[place]}"] += 1
            return function(*arguments, **keywords)

        monkeypatch.setattr(owner, name, counting)

    catalog._parsed.cache_clear()  # as in a new process
    counted(catalog, "read_yaml", "parse", 0)
    counted(models, "weights_hash", "hash", 0)

    def decoded(directory: Path, traces: Iterator[Any]) -> Iterator[Any]:
        seen[f"decode {directory}"] += 1
        return traces

    monkeypatch.setattr(store, "decoded", decoded)
    return seen


def of(counts: Counter[str], label: str) -> dict[str, int]:
    return {key: count for key, count in counts.items() if key.startswith(f"{label} ")}


@pytest.mark.slow
def test_what_a_first_and_a_finished_run_read(
    recipe_file: Callable[..., Path], tmp_path: Path, counts: Counter[str]
) -> None:
    path, run = recipe_file(), tmp_path / "run"
    run_recipe(load_recipe(str(path)), run)
    cards = of(counts, "parse")
    cards.pop(f"parse {run / 'recipe.yaml'}", None)  # the report reads it, to stand for itself
    assert len(cards) == 4 and set(cards.values()) == {1}, cards
    hashed = of(counts, "hash")
    assert len(hashed) == 3 and set(hashed.values()) == {1}, hashed
    decodes = {key: count for key, count in of(counts, "decode").items() if "/eval/" not in key}
    whole = sum(count for key, count in decodes.items() if key.endswith("/traces"))
    parts = max((decodes.get(f"decode {run / 'filtered' / name}", 0) for name in ("kept", "dropped")), default=0)
    assert whole + parts <= 4, decodes

    counts.clear()
    catalog._parsed.cache_clear()
    run_recipe(load_recipe(str(path)), run)
    assert of(counts, "decode") == {}
    assert max(of(counts, "hash").values()) == 1 and set(of(counts, "parse").values()) == {1}
