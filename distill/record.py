"""What a run directory says of itself: its identity, the records of its stages, and what a run needs to know of one.

`read_identity` and `read_recipe` serve whatever only looks at a run (the report, the Python API); `distill.run` is
for work in it.
"""

import hashlib
import json
from pathlib import Path
from typing import Protocol, TypeVar

from pydantic import JsonValue

from distill.artefacts import Artefact, RunPaths, Settings
from distill.errors import UserError
from distill.integrity import FileRecord

FORMAT = 2
S_co = TypeVar("S_co", bound=Artefact, covariant=True)


class StageFiles(Protocol[S_co]):
    """What a run knows of a stage (`distill.stage.Stage`): its name, its files, the type of its summary."""

    @property
    def name(self) -> str:
        """As the command line spells it."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names inside the run directory: everything the stage writes."""

    @property
    def products(self) -> tuple[str, ...]:
        """Globs relative to the run directory: what later stages and people read."""

    @property
    def irreplaceable(self) -> tuple[str, ...]:
        """Those of the products that a finished stage cannot write again by itself."""

    @property
    def summary(self) -> type[S_co]:
        """The model of its summary."""


class Identity(Artefact):
    """`run.json`."""

    format: int
    recipe: str
    created: str
    recipe_sha256: str


class StageRecord(Artefact):
    """`stages/NAME.json`. seconds: worked, pauses left out. resumed: when the last session began, None once finished.
    files: the products, by path relative to the run directory. repairing: damaged products are being
    recreated. machines: where its sessions worked, in order, each once (`hardware.description`)."""

    settings: Settings
    extent: Settings
    begun: str
    resumed: str | None
    seconds: float
    finished: str | None
    summary: dict[str, JsonValue] | None
    files: dict[str, FileRecord]
    repairing: bool = False
    machines: tuple[str, ...] = ()


def read_identity(directory: Path, option: str) -> Identity | None:
    """`run.json` of a run directory; None where there is none. option: how the command line names the directory.
    Errors: UserError when it is damaged or of another version."""
    path = RunPaths(directory).identity
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict) and isinstance(found := content.get("format"), int) and found != FORMAT:
        raise UserError(
            f"{directory}: written by another version of distill (run format {found}, this version writes {FORMAT}); "
            f"choose another {option}"
        )
    return Identity.read(path, f"restore it, or choose another {option}")


def read_recipe(directory: Path, option: str = "RUN") -> str:
    """The text of a run's recipe.yaml, checked against run.json. option: as in `read_identity`.

    Errors: UserError when this is no run directory, or the file is damaged.
    """
    identity, path = read_identity(directory, option), RunPaths(directory).recipe
    if identity is None or not path.is_file():
        raise UserError(f"{directory} is not a run directory: run.json or recipe.yaml is missing")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != identity.recipe_sha256:
        raise UserError(f"{path} is damaged or was edited; run the recipe again, which writes it")
    return data.decode()
