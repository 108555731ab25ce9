"""The report's figures, drawn once for every place they are shown in.

matplotlib draws with the colours of `LIGHT`, which the PNG and SVG files keep. In the page the same SVG is inline: its
colours are replaced by CSS variables, so that one drawing follows the reader's theme, and its text remains text in the
page's font. A drawing cannot reflow, so the page carries each one twice, wide and narrow, and shows the one that fits.
Rejected: a JavaScript chart library (weight, and nothing here needs a mouse), SVG written by hand (axes and ticks are
more code than this file).

`matplotlib.figure.Figure` is used without pyplot: no global state, no display.
"""

import io
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle
from typing import TYPE_CHECKING, NamedTuple

from distill.artefacts import PublishedScores, Scores
from distill.report.records import LogRow, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Every colour here has a CSS variable of the same name in page.html.jinja, with its counterpart for the dark theme.
LIGHT = {
    "paper": "#fdfcf9",
    "ink": "#22262b",
    "muted": "#646b74",
    "line": "#e0ddd5",
    "base": "#69717b",
    "student": "#1a6e8e",
    "teacher": "#a65d12",
    "kept": "#1a6e8f",  # one step from `student`: each colour must identify its variable
    "dropped": "#b4503c",
}
WIDTHS = {"wide": 7.0, "narrow": 3.6}  # inches; at the page's 100 px an inch: a desk, a phone
BINS = 40
NAMES = r"scores|solved|prompts|funnel|lengths|(loss|rollouts|kl)(-\d+)?"  # of all figures


@dataclass(frozen=True)
class Picture:
    """A figure for any width. caption: what it shows, in words; also its alternative text. draw: takes a figure and
    whether it is the narrow one. height: inches; narrow_height: of the narrow one, where it is another."""

    name: str
    caption: str
    draw: Callable[["Figure", bool], None]
    height: float
    narrow_height: float | None = None

    @cached_property
    def svg(self) -> dict[str, str]:
        """Width → the text of a standalone SVG file. The same in every run, with ids that are unique in the page."""
        return {width: _svg(self._figure(width), f"{self.name}-{width}") for width in WIDTHS}

    def png(self) -> bytes:
        """The wide figure as a PNG file, 200 dots an inch."""
        file = io.BytesIO()
        with _any_script():
            self._figure("wide").savefig(file, format="png", dpi=200, metadata={"Software": None})
        return file.getvalue()

    def inline(self, width: str) -> str:
        """The SVG for the page: themed, in the page's font, sized by CSS."""
        head, _, body = self.svg[width].partition("<svg")[2].partition(">")
        box = re.search(r'viewBox="[^"]*"', head)
        assert box, head
        body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
        body = re.sub(r'<g id="[^"]*"', "<g", body)  # ids of groups would be in the page twice
        body = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", body)
        for name, colour in LIGHT.items():
            body = body.replace(colour, f"var(--{name})")
        return f'<svg class="{width}" {box[0]} aria-hidden="true">{body}'

    def _figure(self, width: str) -> "Figure":
        from matplotlib import rc_context
        from matplotlib.figure import Figure

        height = self.narrow_height if self.narrow_height and width == "narrow" else self.height
        with rc_context(_style()):
            figure = Figure(figsize=(WIDTHS[width], height), layout="constrained", facecolor=LIGHT["paper"])
            self.draw(figure, width == "narrow")
            return figure


def _svg(figure: "Figure", salt: str) -> str:
    from matplotlib import rc_context

    file = io.StringIO()
    with _any_script(), rc_context(_style() | {"svg.hashsalt": salt}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    return file.getvalue()


@contextmanager
def _any_script() -> Iterator[None]:
    """Silence the warning of characters that matplotlib's font lacks: a browser has fonts for the text of an SVG."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        yield


def _style() -> dict[str, object]:
    return {
        "svg.fonttype": "none",
        "text.parse_math": False,  # names are text
        "font.size": 9.5,
        "text.color": LIGHT["ink"],
        "axes.facecolor": LIGHT["paper"],
        "axes.edgecolor": LIGHT["line"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.axisbelow": True,
        "grid.color": LIGHT["line"],
        "grid.linewidth": 0.8,
        "xtick.color": LIGHT["line"],
        "ytick.color": LIGHT["line"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"],
        "ytick.major.size": 0,
        "legend.frameon": False,
    }


class _Point(NamedTuple):
    """interval: None for a published score."""

    benchmark: str
    model: str
    value: float
    interval: tuple[float, float] | None


def scores(rows: Sequence[Scores], published: Sequence[PublishedScores] = ()) -> Picture:
    """pass@1 of every model on every benchmark, a point and its interval; published scores are hollow points."""
    benchmarks = list(dict.fromkeys(row.benchmark for row in rows))
    points = [
        _Point(row.benchmark, row.model, row.pass_at_1.value, (row.pass_at_1.low, row.pass_at_1.high)) for row in rows
    ]
    points += [
        _Point(other.benchmark, other.model, other.scores["pass@1"], None)
        for other in published
        if other.benchmark in benchmarks and "pass@1" in other.scores
    ]
    points.sort(key=lambda point: benchmarks.index(point.benchmark))

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        labels, places, y = [], [], 0.0
        for i, point in enumerate(points):
            if len(benchmarks) > 1 and (i == 0 or points[i - 1].benchmark != point.benchmark):
                axes.text(0, y, point.benchmark, va="center", fontweight="bold")
                y += 1
            ours = point.interval is not None
            colour, value = LIGHT[point.model if ours else "muted"], 100 * point.value
            low, high = (100 * end for end in point.interval or (point.value, point.value))
            axes.plot([low, high], [y, y], color=colour, linewidth=5, alpha=0.35, solid_capstyle="butt")
            axes.plot([value], [y], marker="o", markersize=8, color=colour, fillstyle="full" if ours else "none")
            _label(axes, f"{value:.1f} %", y, low, high, room=28 if narrow else 16)
            labels.append(point.model if ours else "published" if narrow else f"{point.model}, published")
            places.append(y)
            y += 1
        axes.set_yticks(places, labels, color=LIGHT["ink"])
        axes.set_ylim(y - 0.5, -0.6)
        axes.set_xlim(-2, 102)
        axes.set_xticks(
            range(0, 101, 20), [f"{tick} %" if tick in (0, 100) else str(tick) for tick in range(0, 101, 20)]
        )
        axes.set_xlabel("pass@1 with 95 % intervals" + (f", {benchmarks[0]}" if len(benchmarks) == 1 else ""))
        axes.grid(axis="x")

    values = "; ".join(
        f"{point.model} on {point.benchmark} {point.value:.1%}, "
        + (f"{point.interval[0]:.1%} to {point.interval[1]:.1%}" if point.interval else "as published")
        for point in points
    )
    lines = len(points) + (len(benchmarks) if len(benchmarks) > 1 else 0)
    return Picture("scores", f"pass@1 with 95 % intervals: {values}", draw, 0.8 + 0.42 * lines)


def _label(axes: "Axes", text: str, y: float, low: float, high: float, room: float) -> None:
    """Write a value where there is room: right of its interval, left of it, or right of the axes. room: per cent of the
    axis that the text takes, with its distance."""
    if high < 70:
        axes.text(high + 3, y, text, va="center", ha="left")
    elif low > room:
        axes.text(low - 3, y, text, va="center", ha="right")
    else:
        axes.text(1.02, y, text, va="center", ha="left", transform=axes.get_yaxis_transform())


def funnel(steps: Sequence[tuple[str, int, int]]) -> Picture:
    """The traces left after each filter. steps: (label, traces left, traces dropped here), the first with nothing
    dropped."""
    total = max(1, steps[0][1])

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        gap = 0.015 * total
        for y, (_, left, dropped) in enumerate(steps):
            axes.barh(y, left, height=0.62, color=LIGHT["kept"])
            axes.barh(y, dropped, left=left, height=0.62, color=LIGHT["dropped"])
            fits = left > (0.25 if narrow else 0.15) * total
            if fits:
                axes.text(left - gap, y, f"{left:,}", va="center", ha="right", color=LIGHT["paper"])
            labels = ([] if fits else [f"{left:,}"]) + ([f"\N{MINUS SIGN}{dropped:,}"] if dropped else [])
            axes.text(left + dropped + gap, y, "  ".join(labels), va="center", color=LIGHT["ink"])
        axes.set_yticks(range(len(steps)), [label for label, _, _ in steps], color=LIGHT["ink"])
        axes.set_ylim(len(steps) - 0.5, -0.5)
        axes.set_xlim(0, total * (1.2 if narrow else 1.12))  # room for the labels beside the bars
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)

    counts = "; ".join(f"{label}: {left:,} left, {dropped:,} dropped" for label, left, dropped in steps)
    return Picture("funnel", f"Traces left after each filter. {counts}", draw, 0.2 + 0.38 * len(steps))


def training(rows: Sequence[LogRow], parts: Mapping[str, str], name: str = "loss") -> Picture:
    """Loss, and below it the learning rate, over optimiser steps. rows: of checkpoints/log.jsonl.

    With the loss go the other losses of the log: of held-out rows, and the objective's parts (name → label).
    """
    steps, losses = zip(*points(rows, "loss"), strict=True)
    others = {label: points(rows, key) for key, label in {"eval_loss": "held out", **parts}.items() if key != "loss"}
    logarithmic = min(losses) > 0 and max(losses) > 20 * min(losses)

    def draw(figure: "Figure", narrow: bool) -> None:
        loss, rate = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
        mark = "o" if len(steps) == 1 else None  # a line through one point is invisible
        loss.plot(steps, losses, color=LIGHT["student"], linewidth=1.6, marker=mark, label="training")
        for (label, line), name in zip(others.items(), cycle(("teacher", "base", "muted")), strict=False):
            if line:
                loss.plot(*zip(*line, strict=True), color=LIGHT[name], linewidth=1.2, label=label)
        if any(others.values()):
            loss.legend(frameon=False, fontsize=9, labelcolor=LIGHT["ink"])
        loss.set_yscale("log" if logarithmic else "linear")
        if not logarithmic and min(losses) >= 0:  # rewards make a loss negative
            loss.set_ylim(bottom=0)
        rate.plot(*zip(*points(rows, "learning_rate"), strict=True), color=LIGHT["muted"], linewidth=1.2, marker=mark)
        rate.set_ylim(bottom=0)
        rate.set_xlabel("optimiser step")
        for axes, title in ((loss, "loss, nats per supervised token"), (rate, "learning rate")):
            axes.set_title(title, loc="left", fontsize=9.5, color=LIGHT["muted"])
            axes.grid(axis="y")
            axes.margins(x=0.01)
            plain_ticks(axes)

    caption = f"Training loss from {losses[0]:.3g} at step {steps[0]:,} to {losses[-1]:.3g} at step {steps[-1]:,}"
    if scored := others["held out"]:
        caption += f"; on held-out rows {scored[0][1]:.3g} to {scored[-1][1]:.3g}"
    return Picture(name, caption, draw, 3.6)


def plain_ticks(axes: "Axes") -> None:
    """Label ticks as 0.05 rather than 5 x 10^-2, and major ones only: labels of minor ticks would overlap."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    if axes.get_yscale() == "log":
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=8))
    axes.yaxis.set_tick_params(which="minor", length=0)


def lengths(kept: Sequence[int], dropped: Sequence[int], unit: str) -> Picture:
    """Completion lengths of kept and dropped traces, stacked histograms. unit: tokens or words."""
    longest = max([*kept, *dropped, 1])

    def draw(figure: "Figure", narrow: bool) -> None:
        axes = figure.subplots()
        axes.hist(
            [kept, dropped],
            bins=min(BINS, longest),
            range=(0, longest),
            stacked=True,
            color=[LIGHT["kept"], LIGHT["dropped"]],
            label=[f"kept ({len(kept):,})", f"dropped ({len(dropped):,})"],
            rwidth=0.9,
        )
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1),
            ncols=2,
            borderaxespad=0,
            handlelength=1,
            labelcolor=LIGHT["ink"],
        )
        axes.set_xlabel(f"{unit} per completion")
        axes.set_ylabel("traces")
        axes.set_xlim(0, longest)
        axes.grid(axis="y")
        axes.yaxis.get_major_locator().set_params(integer=True)

    caption = f"Lengths of {len(kept):,} kept and {len(dropped):,} dropped traces, up to {longest:,} {unit}"
    return Picture("lengths", caption, draw, 2.6)


def solved(name: str, panels: Mapping[str, Mapping[str, Sequence[tuple[int, int]]]]) -> Picture:
    """How often each problem was solved: histograms of pass rates, one panel below the other.

    panels: title → model → (right, all) samples of each problem. Bars are shares of the model's problems. Where all
    problems have the same number of samples, up to 16, there is a bar for each number of right ones, else for each
    tenth.
    """

    def draw(figure: "Figure", narrow: bool) -> None:
        for axes, (title, models) in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True
        ):
            bins = _bins(models.values())
            width = 0.84 / bins / len(models)
            for number, (model, counts) in enumerate(models.items()):
                shares = _shares(counts, bins)
                places = [at / bins + (number - (len(models) - 1) / 2) * width for at in range(bins + 1)]
                axes.bar(places, [100 * share for share in shares], width, color=LIGHT[model], label=model)
            axes.set_title(title, loc="left", fontsize=9.5, color=LIGHT["muted"])
            axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25", "50", "75", "100 %"])
            axes.set_ylabel("% of problems")
            axes.grid(axis="y")
            axes.margins(x=0.01)
        axes.set_xlabel("share of a problem's samples that are right")
        if any(len(models) > 1 for models in panels.values()):
            handles, labels = figure.axes[0].get_legend_handles_labels()
            figure.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=1, labelcolor=LIGHT["ink"])

    counted = "; ".join(
        f"{title}: of {len(counts):,} problems {model} solved {sum(right == count for right, count in counts):,} "
        f"every time, {sum(right == 0 for right, _ in counts):,} never"
        for title, models in panels.items()
        for model, counts in models.items()
    )
    return Picture(name, f"How often each problem was solved. {counted}", draw, 0.7 + 1.7 * len(panels))


def _bins(models: Iterable[Sequence[tuple[int, int]]]) -> int:
    sizes = {size for counts in models for _, size in counts}
    return min(sizes) if len(sizes) == 1 and max(sizes) <= 16 else 10


def _shares(solved: Sequence[tuple[int, int]], bins: int) -> list[float]:
    """The shares of problems whose rate is nearest to 0, 1/bins … 1."""
    counts = Counter(round(bins * right / size) for right, size in solved)
    return [counts[at] / len(solved) for at in range(bins + 1)]
