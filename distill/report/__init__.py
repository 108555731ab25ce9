"""`report.html`: what a run did, on one page that can be mailed.

Self-contained: styles, pictures and one small script are inside the file, and its content security policy forbids every
request and every other script. It reads the run directory only, so a report can be written anew, also of a run copied
from another machine, without torch or the weights. contents.py says what is read, pictures.py what is drawn,
mathematics.py how formulas are, page.html.jinja how it looks, reader.js how traces are found in it.

The pictures also go to `<run>/report/`, as SVG and PNG, for slides and READMEs.
"""

import base64
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.artefacts import ReportSummary, Settings
from distill.durable import write_whole
from distill.fingerprint import digest
from distill.report import pictures
from distill.report.contents import Contents, StageTime, read_contents
from distill.report.mathematics import marked_up
from distill.stage import Stage

if TYPE_CHECKING:
    from distill.run import Run


class Report(Stage[ReportSummary]):
    """`report.html` and its figures: made again whenever one is missing, or what they show has changed."""

    name = "report"
    outputs = ("report.html", "report")
    products = ("report.html", "report/*.svg", "report/*.png")
    reads = ("generate", "filter", "train", "eval")
    summary = ReportSummary

    def settings(self, run: "Run") -> Settings:
        """None: nothing of it is worth refusing."""
        return {}

    def extent(self, run: "Run") -> Settings:
        """The records of the stages that it shows, and the price."""
        records = {name: run.record(name) for name in self.reads}
        extent: Settings = {
            name: digest([record.settings, record.extent, record.finished, record.summary])
            for name, record in records.items()
            if record
        }
        return extent | {"price_per_hour": run.recipe.price_per_hour}

    def work(self, run: "Run", begin: Callable[[], None]) -> ReportSummary:
        """Write it. Errors: UserError when a file of the run is damaged."""
        begin()
        path = write_report(run.directory)
        return ReportSummary(page=path.name, bytes=path.stat().st_size)

    def headline(self, summary: ReportSummary) -> str:
        """Its size."""
        return f"{summary.page}, {summary.bytes / 1e6:.1f} MB"


def write_report(directory: Path, price_per_hour: float | None = None) -> Path:
    """Write `report.html` and `report/*.{svg,png}` of a run directory; returns the page's path.

    price_per_hour: what an hour of the machine costs; the recipe's by default.
    Stages that have not run are named as missing. Raises UserError when this is no run directory, or is damaged.
    """
    contents = read_contents(directory, price_per_hour)
    drawn = _pictures(contents)
    page = _render(contents, drawn)
    folder = directory / "report"
    folder.mkdir(exist_ok=True)
    for picture in drawn.values():
        write_whole(folder / f"{picture.name}.svg", picture.svg["wide"])
        write_whole(folder / f"{picture.name}.png", picture.png())
    path = directory / "report.html"
    write_whole(path, page.encode("utf-8", "replace").decode())  # a trace may hold half a character
    return path


def _pictures(contents: Contents) -> dict[str, pictures.Picture]:
    drawn = []
    if contents.scores:
        drawn.append(pictures.scores(contents.scores, contents.published))
    if contents.solved_of:
        drawn.append(pictures.solved("solved", contents.solved_of))
    if contents.solved:
        title = f"{contents.recipe.teacher} on the prompts"
        drawn.append(pictures.solved("prompts", {title: {"teacher": contents.solved}}))
    if contents.filtered:
        steps = [("generated", contents.filtered.total, 0)]
        steps += [(step.filter, step.kept, step.dropped) for step in contents.filtered.funnel]
        drawn.append(pictures.funnel(steps))
    if contents.kept_lengths or contents.dropped_lengths:
        drawn.append(pictures.lengths(contents.kept_lengths, contents.dropped_lengths))
    if contents.log:
        drawn.append(pictures.training(contents.log))
    return {picture.name: picture for picture in drawn}


def _render(contents: Contents, drawn: dict[str, pictures.Picture]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("distill.report", "."),
        autoescape=True,  # whatever a model wrote is text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": _percent, "count": _count, "money": _money, "mathematics": marked_up}
    environment.filters |= {"duration": _duration, "worked": _worked}
    reader = (Path(__file__).parent / "reader.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(reader.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        c=contents, pictures=drawn, light=pictures.LIGHT, reader=reader, reader_hash=f"sha256-{digest}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _count(number: float | None) -> str:
    return "–" if number is None else f"{number:,.0f}"


def _money(amount: float | None) -> str:
    return "" if amount is None else f"{amount:,.2f}"


def _worked(stage: StageTime) -> str:
    if not stage.finished:
        return "not finished"
    return "not known" if stage.seconds is None else _duration(stage.seconds)


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    parts: list[tuple[Any, str]] = [(hours, "h"), (minutes, "min"), (seconds, "s")]
    return " ".join(f"{n} {unit}" for n, unit in parts if n) or "under 1 s"
