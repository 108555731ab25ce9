"""Which models are scored, and what an evaluation needs to know of each.

The base is scored with the student's training template, not with its own: both then read the very same prompt, and the
difference between their scores is the training. The student's directory carries that template already.
"""

import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from distill import model_files
from distill.backends import Backend
from distill.errors import UserError
from distill.models import Model, Server

if TYPE_CHECKING:
    from distill.recipe import LocalEngine
    from distill.run import Run

Open = Callable[[Model, "LocalEngine", int], AbstractContextManager[Backend]]  # as `backends.open`

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
SERVER_NAMES = re.compile(r"[^A-Za-z0-9._-]+")  # what a model's name on a server may have and a directory's may not


def models_of(run: "Run") -> list[Model]:
    """The models that the recipe wants scored, in its order. Errors: UserError when one of them is not there."""
    return [getattr(run.models, name) for name in dict.fromkeys(run.recipe.eval.models)]


def model_at(place: str, name: str | None, key: str | None, open_: Open, engine: "LocalEngine") -> Model:
    """The model that `--model` means: a directory, a hub id, or the address of a server.

    name: of the model on the server, or what a directory's scores are called. Errors: UserError when there is no model,
    the server does not answer, or the name cannot be a directory's.
    """
    if "://" in place:
        with open_(Model("server", Server(place, name, key)), engine, 1) as backend:
            served = str(backend.identity["model"])
        return Model(SERVER_NAMES.sub("-", served).strip("-.") or "model", Server(place, served, key))
    if name is not None and not NAME.fullmatch(name):
        raise UserError(
            f"--name {name}: it becomes a directory's name; use letters, digits, `.`, `_` and `-`, and begin with a "
            f"letter or digit"
        )
    directory = model_files.model_directory(str(Path(place)))
    return Model(name or directory.name, directory)


def engine_for(model: Model, engine: "LocalEngine") -> "LocalEngine":
    """How the local engine runs a model: only the teacher has a layer that drafts."""
    drafts = engine.num_speculative_tokens if model.name == "teacher" else 0
    return engine.model_copy(update={"num_speculative_tokens": drafts})


def length_unit(model: Model) -> str:
    """The unit of `length_function`: a server's tokenizer is not known, so reasoning is counted in words there."""
    return "words" if isinstance(model.place, Server) else "tokens"


def length_function(model: Model) -> Callable[[str], int]:
    """A function from a text to its length in `length_unit`. Loads the tokenizer, not the model."""
    if isinstance(model.place, Server):
        return lambda text: len(text.split())
    chat = model.chat
    return lambda text: len(chat.text_ids(text))
