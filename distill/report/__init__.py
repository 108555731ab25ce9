"""`report.html`: what a run did, on one page that can be mailed.

Self-contained: styles, figures and one small script are inside the file, and its content security policy forbids every
request and every other script. It reads the run directory only, so a report can be written anew, also of a run copied
from another machine, without torch or the weights. contents.py says what is read, pictures.py and curves.py what is
drawn, mathematics.py how formulas are typeset, page.html.jinja how it looks, reader.js how traces are found in it.

The figures also go to `<run>/report/`, as SVG and PNG, for slides and READMEs. The same run gives the same bytes.

The report is a stage: written when it is missing, damaged or older than what it shows. `distill report` writes it in
any case, with another price or after an update of the toolkit.
"""

import base64
import hashlib
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from distill import lock
from distill.artefacts import ReportSummary, RunPaths, Settings
from distill.config import parse, read_yaml
from distill.console import say
from distill.durable import write_whole
from distill.errors import UserError
from distill.fingerprint import digest
from distill.recipe import Recipe
from distill.record import read_recipe
from distill.report import pictures
from distill.report.contents import Contents, StageTime, read_contents
from distill.report.curves import curves
from distill.report.mathematics import marked_up
from distill.run import Run
from distill.stage import Stage

if TYPE_CHECKING:
    from distill.report.pictures import Picture


class Report(Stage[ReportSummary]):
    """`report.html` and its figures. price_per_hour: what an hour of the machine costs; default: the recipe's."""

    name = "report"
    outputs = ("report.html", "report")
    products = ("report.html", "report/*.svg", "report/*.png")
    reads = ("generate", "filter", "train", "eval")
    summary = ReportSummary

    def __init__(self, price_per_hour: float | None = None) -> None:
        self.price = price_per_hour

    def settings(self, run: Run) -> Settings:
        """None: a report is never refused, only written again."""
        return {}

    def extent(self, run: Run) -> Settings:
        """The records of the stages that it shows, and the price."""
        records = {name: run.record(name) for name in self.reads}
        extent: Settings = {
            name: digest([record.settings, record.extent, record.finished, record.summary])
            for name, record in records.items()
            if record
        }
        plan = run.paths.plan
        if plan.exists():
            extent["plan"] = digest(plan.read_text(encoding="utf-8", errors="replace"))
        return extent | {"price_per_hour": run.recipe.price_per_hour if self.price is None else self.price}

    def work(self, run: Run, begin: Callable[[], None]) -> ReportSummary:
        """Write it; `perform` has hashed the files that it reads. Errors: UserError when a file cannot be read."""
        contents = read_contents(run.directory, run.recipe, self.price, verified=True)
        begin()
        return _write(run.directory, contents)

    def set_damage_aside(self, run: Run) -> None:
        """Nothing: its files hold nothing of their own and are written over. `distill report` beside a working process
        writes a page that is in no record, and that is no damage."""

    def headline(self, summary: ReportSummary) -> str:
        """Its size."""
        return f"{summary.page}, {summary.bytes / 1e6:.1f} MB"

    def rewrite(self, run: Run) -> None:
        """Write it although it may be finished. Errors: UserError when a file of the run is damaged."""
        contents = read_contents(run.directory, run.recipe, self.price)
        run.begin(self, self.settings(run), self.extent(run))
        run.finish(self, _write(run.directory, contents))


def write_report(directory: Path, price_per_hour: float | None = None) -> Path:
    """Write `report.html` and `report/*.{svg,png}` of a run directory; returns the page's path.

    price_per_hour: what an hour of the machine costs; default: the recipe's. Stages that have not run are named as
    missing. While another process works in the directory the page shows what is there, and is not recorded. Errors:
    UserError when this is no run directory, a file in it is damaged, or the price is negative or not finite.
    """
    if price_per_hour is not None and not 0 <= price_per_hour < math.inf:
        raise UserError(f"--price-per-hour {price_per_hour:g}: give a finite number, 0 or more")
    read_recipe(directory)
    paths = RunPaths(directory)
    recipe = parse(Recipe, read_yaml(paths.recipe), str(paths.recipe))
    if lock.is_held(directory):
        say(f"note: another process works in {directory}; the report shows what is finished")
        _write(directory, read_contents(directory, recipe, price_per_hour))
    else:
        with Run(directory, recipe, option="RUN") as run:
            Report(price_per_hour).rewrite(run)
    return paths.report


def _write(directory: Path, contents: Contents) -> ReportSummary:
    """The figures first, the page last; each file is replaced in one step."""
    paths, drawn = RunPaths(directory), _pictures(contents)
    page = _render(contents, drawn).encode("utf-8", "replace")  # a trace may hold half a character
    paths.pictures.mkdir(exist_ok=True)
    for path in paths.pictures.iterdir():
        if path.stem not in drawn and re.fullmatch(pictures.NAMES, path.stem) and path.suffix in (".svg", ".png"):
            path.unlink()
    for picture in drawn.values():
        write_whole(paths.pictures / f"{picture.name}.svg", picture.svg["wide"])
        write_whole(paths.pictures / f"{picture.name}.png", picture.png())
    write_whole(paths.report, page)
    return ReportSummary(page=paths.report.name, bytes=len(page))


def _pictures(contents: Contents) -> "dict[str, Picture]":
    drawn = []
    if contents.scores:
        drawn.append(pictures.scores(contents.scores, contents.published))
    if contents.solved_by:
        drawn.append(pictures.solved("solved", contents.solved_by))
    if contents.solved:
        title = f"{Path(contents.recipe.teacher).name} on the prompts"  # of a path the end; a figure is narrow
        drawn.append(pictures.solved("prompts", {title: {"teacher": contents.solved}}))
    if contents.filtered:
        steps = [("generated", contents.filtered.total, 0)]
        steps += [(step.filter, step.kept, step.dropped) for step in contents.filtered.funnel]
        drawn.append(pictures.funnel(steps))
    if contents.lengths.total:
        drawn.append(pictures.lengths(contents.lengths.kept, contents.lengths.dropped, contents.lengths.unit))
    drawn += curves(contents.log, contents.recipe.train)
    for phase in contents.phases:
        drawn += curves(phase.log, phase.training, f"-{phase.number}")
    return {picture.name: picture for picture in drawn}


def _render(contents: Contents, drawn: "dict[str, Picture]") -> str:
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
    checksum = base64.b64encode(hashlib.sha256(reader.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        c=contents, pictures=drawn, light=pictures.LIGHT, reader=reader, reader_hash=f"sha256-{checksum}"
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
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return " ".join(f"{n} {unit}" for n, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if n) or "under 1 s"
