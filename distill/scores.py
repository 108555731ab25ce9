"""What scores say in words, for the terminal and the report: one model beside another, ours beside the published."""

from typing import Any


def difference(made: dict[str, Any]) -> str:
    """One line: how far apart two models are, and in how many problems."""
    one, two = made["models"]
    return (
        f"{one} − {two}: {100 * made['difference']:+.1f} points (95 %: {100 * made['low']:+.1f} to "
        f"{100 * made['high']:+.1f}); better in {len(made['gained']):,} problems, worse in {len(made['lost']):,}, "
        f"sign test p = {made['p']:.2g}"
    )


def beside_published(other: dict[str, Any], row: dict[str, Any]) -> str:
    """One line: what was published, and whether a pass@1 falls inside our interval."""
    said = []
    if (value := other.get("pass@1")) is not None:
        where = "inside" if row["pass@1_low"] <= value <= row["pass@1_high"] else "outside"
        said.append(f"pass@1 {value:.1%}, {where} the interval of {row['model']}")
    said += [f"{key} {other[key]:.1%}" for key in other if key.startswith(("cons@", "pass@")) and key != "pass@1"]
    return f"published for {other['model']}: {', '.join(said)}"
