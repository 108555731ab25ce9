"""Stages that write a file each, for tests of the run directory."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from distill.artefacts import Artefact, Settings
from distill.recipe import Recipe
from distill.run import Run
from distill.stage import Stage


class Words(Artefact):
    """The summary of the stages below."""

    words: str


class Writing(Stage[Words]):
    """Writes its name into a file of each of its outputs."""

    summary = Words

    def __init__(self, name: str, *outputs: str, settings: Settings | None = None, samples: int = 1) -> None:
        self.name, self.outputs = name, outputs
        self.products = tuple(f"{output}/*" for output in outputs)
        self.asked, self.samples = settings or {"seed": 0}, samples

    def settings(self, run: Run) -> Settings:
        return self.asked

    def extent(self, run: Run) -> Settings:
        return {"samples": self.samples}

    def work(self, run: Run, begin: Callable[[], None]) -> Words:
        begin()
        for output in self.outputs:
            (run.directory / output).mkdir(exist_ok=True)
            (run.directory / output / "file").write_text(f"{self.name} {self.samples}")
        return Words(words=self.name)

    def headline(self, summary: Words) -> str:
        return summary.words


OUTPUTS = {"generate": ["traces"], "filter": ["filtered"], "train": ["checkpoints", "student"], "eval": ["eval"]}
GENERATE, FILTER, TRAIN, EVAL = STAGES = [Writing(name, *outputs) for name, outputs in OUTPUTS.items()]


def generate(settings: Settings | None = None, samples: int = 1) -> Writing:
    return Writing("generate", "traces", settings=settings, samples=samples)


def finished(run: Run, stage: Writing) -> Words | None:
    return run.finished(stage, stage.settings(run), stage.extent(run))


def begin(run: Run, stage: Writing) -> None:
    run.begin(stage, stage.settings(run), stage.extent(run))


def perform(run: Run, stages: Sequence[Writing] = STAGES) -> None:
    for stage in stages:
        stage.perform(run)


def recipe(name: str = "small", **changes: Any) -> Recipe:
    base = {
        "name": name,
        "teacher": "t",
        "student": "s",
        "prompts": [{"kind": "procedural", "name": "arithmetic"}],
        "eval": {"benchmarks": ["b"]},
    }
    return Recipe.model_validate(base | changes)


def content(directory: Path) -> dict[str, bytes]:
    """Every file of a directory but the lock."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def rewritten(path: Path, model: type[Artefact], **changes: Any) -> None:
    """Change fields of an artefact as its writer would have written them."""
    model.read(path, "").model_copy(update=changes).write(path)


def finished_run(directory: Path) -> Path:
    with Run(directory, recipe()) as run:
        perform(run)
    return directory
