"""The curves of one training whose rows the student writes: what the rollouts were like, step by step.

Each figure takes the lines of one log, so that a run and each of its phases draw the same ones. Quantities of different
units have panels of their own below or beside one another: with two scales in one panel, where curves cross is an
accident of the scales. The KL divergence by position is drawn as lines for a few eighths of the token limit; a heat map
of all eighths would be a raster image, which does not follow the page's theme.
"""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

from distill.objectives import RolloutSettings
from distill.recipe import Training
from distill.report.pictures import LIGHT, Picture, plain_ticks, training
from distill.report.records import LogRow, Points, points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("student", "teacher", "base", "dropped")
PANEL = 2.0  # inches
BUCKETS = 8  # numbers in `kl_by_position`


class Panel(NamedTuple):
    """title: with the unit. lines: label → points. shares: whether the axis is from 0 to 100 %."""

    title: str
    lines: dict[str, Points]
    shares: bool = False


def curves(log: Sequence[LogRow], settings: Training, ending: str = "") -> list[Picture]:
    """All figures of one training's log; nothing of an empty one. ending: of the figures' names, such as `-2`.

    With rollouts the parts of the objective have figures of their own: entropy and divergence are no losses.
    """
    if not log:
        return []
    objective = settings.objective
    rollouts = objective.rollout_settings
    if rollouts is None:
        return [training(log, objective.parts, f"loss{ending}")]
    figures = [_rollouts(log, objective.parts, f"rollouts{ending}"), _positions(log, rollouts, f"kl{ending}")]
    return [each for each in figures if each is not None] + [training(log, {}, f"loss{ending}")]


def _rollouts(log: Sequence[LogRow], parts: Mapping[str, str], name: str) -> Picture | None:
    """Rewards, divergence, entropy, length and shares; panels of what the log does not have are left out."""
    solved, reward = points(log, "correct"), points(log, "reward")
    answers = {"pass@1, also the reward": solved} if solved == reward else {"pass@1": solved, "reward": reward}
    divergence = points(log, "kl")  # all 0 where the objective has no such term
    shares = {
        "cut off at the token limit": points(log, "truncated", 100),
        "with a loop": points(log, "repetition", 100),
        "groups without variance": points(log, "skipped_groups", 100),
    }
    panels = [
        Panel("answers to the prompts", answers),
        Panel(f"{parts['kl']}, nats per token", {"": divergence if any(value for _, value in divergence) else []}),
        Panel(f"{parts['entropy']}, nats per token", {"": points(log, "entropy")}),
        Panel("length, mean tokens", {"": points(log, "length")}),
        Panel("share of the rollouts, %", shares, shares=True),
    ]
    panels = [each._replace(lines={label: line for label, line in each.lines.items() if line}) for each in panels]
    panels = [each for each in panels if each.lines]
    if not panels:
        return None
    rows = -(-len(panels) // 2)

    def draw(figure: "Figure", narrow: bool) -> None:
        grid = figure.subplots(len(panels) if narrow else rows, 1 if narrow else 2, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            _panel(axes, panel)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)

    caption = "The student's rollouts. " + "; ".join(_change(panel) for panel in panels)
    return Picture(name, caption, draw, PANEL * rows, PANEL * len(panels))


def _positions(log: Sequence[LogRow], rollouts: RolloutSettings, name: str) -> Picture | None:
    """The divergence of the first, a middle and the last eighth of the token limit that most steps reach."""
    rows = [(row["step"], means) for row in log if isinstance(means := row.get("kl_by_position"), list)]
    eighths = [points([{"step": step, "kl": means[i]} for step, means in rows], "kl") for i in range(BUCKETS)]
    reached = [i for i, each in enumerate(eighths) if each and 2 * len(each) >= len(rows)]
    if not reached:
        return None
    limit = rollouts.sampling.max_new_tokens
    chosen = dict.fromkeys((reached[0], reached[len(reached) // 2], reached[-1]))
    lines = {_range(i, limit): eighths[i] for i in chosen}
    panel = Panel("log-probability under the student less that under the teacher, by tokens of the answer", lines)

    def draw(figure: "Figure", narrow: bool) -> None:
        title = "student less teacher, nats per token" if narrow else panel.title
        _panel(figure.subplots(), panel._replace(title=title))

    return Picture(name, f"KL divergence by position, {_change(panel)}", draw, 2.6)


def _range(number: int, limit: int) -> str:
    """The tokens of an eighth of the limit, counted from 1."""
    first, last = -(-number * limit // BUCKETS) + 1, -(-(number + 1) * limit // BUCKETS)
    return f"{first:,} – {last:,}"


def _panel(axes: "Axes", panel: Panel) -> None:
    for (label, line), colour in zip(panel.lines.items(), COLOURS, strict=False):
        mark = "o" if len(line) == 1 else None  # a line through one point is invisible
        axes.plot(*zip(*line, strict=True), color=LIGHT[colour], linewidth=1.4, marker=mark, label=label)
    values = [y for line in panel.lines.values() for _, y in line]
    if panel.shares:
        axes.set_ylim(-3, 103)
    elif min(values) >= 0:
        axes.set_ylim(bottom=0)
    if any(panel.lines):  # labels
        axes.legend(frameon=False, fontsize=8, labelcolor=LIGHT["ink"], handlelength=1.2, borderaxespad=0.2)
    axes.set_title(panel.title, loc="left", fontsize=9, color=LIGHT["muted"])
    axes.set_xlabel("optimiser step", fontsize=8.5)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y")
    axes.margins(x=0.01)
    plain_ticks(axes)


def _change(panel: Panel) -> str:
    lines = (f"{label} {line[0][1]:.3g} to {line[-1][1]:.3g}".strip() for label, line in panel.lines.items())
    return f"{panel.title}: {', '.join(lines)}"


class Spent(NamedTuple):
    """What a part of a training took. share: of the whole; None while the training is not finished."""

    what: str
    seconds: float
    share: float | None


def time_spent(log: Sequence[LogRow], rollouts: RolloutSettings, seconds: float | None) -> list[Spent]:
    """The time of a training by what it was spent on. seconds: of the whole; None while it is not finished.

    A line of the log has the mean over the sets of rollouts since the line before; how many these were follows from the
    steps.
    """
    names = {"seconds_sync": "weights to the engine", "seconds_rollouts": "rollouts", "seconds_scoring": "scoring"}
    ends = _ends(log, rollouts, seconds is not None)
    spent = {what: sum(ends.get(step, 0) * mean for step, mean in points(log, key)) for key, what in names.items()}
    if seconds is not None:
        spent["training"] = max(0.0, seconds - sum(spent.values()))
    whole = sum(spent.values())
    return [Spent(what, each, each / whole if seconds and whole else None) for what, each in spent.items()]


def _ends(log: Sequence[LogRow], rollouts: RolloutSettings, finished: bool) -> dict[float, float]:
    """Step of a line → the number of sets that ended since the line before. The last step ends its set, also where a
    set has further updates."""
    steps = [step for step, _ in points(log, "step")]
    ends = [0.0, *(step // rollouts.updates for step in steps)]
    if finished and steps:
        ends[-1] = -(-steps[-1] // rollouts.updates)
    return {step: last - first for step, (first, last) in zip(steps, pairwise(ends), strict=True)}
