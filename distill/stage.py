"""What a stage is. The table of them is `distill.pipeline.STAGES`; run, pipeline and command line know nothing else.

A stage depends on two groups of values. Its *settings* decide what its output is: with other settings it is refused.
Its *extent* says how much of it is wanted: with another extent the stage is merely not finished, and goes on.

It names two groups of files. *Outputs* are everything it writes, which `--fresh` moves aside. *Products* are those
among them that later stages and people read: they are recorded with size and hash when the stage finishes, and the
stage counts as finished only while they are there and whole.

`perform` is the same for all stages; a stage supplies what differs. Its `work` checks the input first and then calls
`begin`: what is refused before that leaves nothing behind.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

from distill.artefacts import Artefact, Settings
from distill.errors import UserError

if TYPE_CHECKING:
    from distill.recipe import Recipe
    from distill.run import Run

S = TypeVar("S", bound=Artefact)


class Stage(ABC, Generic[S]):
    """One stage. name: as the command line spells it. outputs: names inside the run directory. products: globs relative
    to it. irreplaceable: globs of products that a finished stage cannot write again by itself. reads: stages whose
    products its work reads. summary: the model of what `work` returns."""

    name: str
    outputs: tuple[str, ...]
    products: tuple[str, ...]
    irreplaceable: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    summary: type[S]

    def recipe_settings(self, recipe: "Recipe") -> Settings:
        """The settings that the recipe alone decides: compared before any stage runs, cheaply."""
        return {}

    @abstractmethod
    def settings(self, run: "Run") -> Settings:
        """All that decides the output, `recipe_settings` included. Errors: UserError when an input is missing."""

    def extent(self, run: "Run") -> Settings:
        """How much of it is wanted. Errors: UserError when an input is missing or cannot be read."""
        return {}

    @abstractmethod
    def work(self, run: "Run", begin: Callable[[], None]) -> S:
        """Do what is left, and return the summary of the whole stage.

        Check the input, then call `begin`, then write. Everything that was written is on the disk when this returns.
        Errors: UserError before `begin` for what the user can correct; WorkError when the work fails.
        """

    @abstractmethod
    def headline(self, summary: S) -> str:
        """The result in half a line, for the table at the end of `distill run`."""

    def is_finished(self, run: "Run") -> bool:
        """Whether nothing is left to do. Reads no trace and no weights. Errors: as `settings` and `extent`."""
        return run.finished(self, self.settings(run), self.extent(run)) is not None

    def set_damage_aside(self, run: "Run") -> None:
        """Keep products that are not as recorded, before they are made again."""
        run.set_damage_aside(self)

    def perform(self, run: "Run", inputs: "Sequence[Stage[Artefact]]" = ()) -> S:
        """Recognise, resume or start the stage; returns its summary. inputs: the stages that it reads.

        Errors: as `work`, and UserError when an input is damaged.
        """
        try:
            settings, extent = self.settings(run), self.extent(run)
            finished = run.finished(self, settings, extent)
        except UserError:
            run.check_inputs(inputs, content=False)  # explains more than the settings that follow from a damaged input
            raise
        if finished is not None:
            return finished
        self.set_damage_aside(run)
        run.check_inputs(inputs)
        summary = self.work(run, lambda: run.begin(self, settings, extent))
        run.finish(self, summary)
        return summary
