"""Which models are scored, and what loads them.

The base is scored with the student's training template, not with its own: both then read the very same prompt, and the
difference between them is the training. The student's directory carries that template already.
"""

import gc
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import JsonValue

from distill import backends, catalog
from distill.backends import Backend
from distill.backends.remote import RemoteBackend
from distill.errors import UserError
from distill.models import Model, Server

if TYPE_CHECKING:
    from distill.recipe import LocalEngine
    from distill.run import Run


NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, eq=False)
class Contender:
    """A model to be scored. `counted_in`: what `token_counter` counts."""

    model: Model
    counted_in: str = "tokens"

    @property
    def name(self) -> str:
        """What its scores are called."""
        return self.model.name

    @property
    def identity(self) -> dict[str, JsonValue]:
        """Hashes of weights and template, and the mode."""
        return self.model.identity


class Models(Protocol):
    """What loads a contender."""

    def backend(self, contender: Contender) -> AbstractContextManager[Backend]:
        """The model, in memory while the context lasts."""
        ...

    def token_counter(self, contender: Contender) -> Callable[[str], int]:
        """A function from text to its length in the contender's tokens. Needs its tokenizer only."""
        ...


class LocalModels:
    """Model directories on the local engine."""

    def __init__(self, max_batch: int, engine: "LocalEngine") -> None:
        self.max_batch, self.engine = max_batch, engine

    @contextmanager
    def backend(self, contender: Contender) -> Iterator[Backend]:
        gc.collect()  # the model before this one may hang in a reference cycle
        drafts = self.engine.num_speculative_tokens if contender.name == "teacher" else 0
        engine = self.engine.model_copy(update={"num_speculative_tokens": drafts})
        with backends.open(contender.model, engine, self.max_batch) as backend:
            yield backend

    def token_counter(self, contender: Contender) -> Callable[[str], int]:
        tokenizer = contender.model.chat.tokenizer
        return lambda text: len(tokenizer(text, add_special_tokens=False)["input_ids"])


class ServedModel:
    """The one model of a server. Its tokenizer is not known: reasoning is counted in words."""

    def __init__(self, served: RemoteBackend) -> None:
        self.served = served
        name = re.sub(r"[^A-Za-z0-9._-]+", "-", served.model).strip("-.") or "model"
        self.contender = Contender(Model(name, Server("", served.model)), counted_in="words")

    @contextmanager
    def backend(self, contender: Contender) -> Iterator[Backend]:
        yield self.served

    def token_counter(self, contender: Contender) -> Callable[[str], int]:
        return lambda text: len(text.split())


def model_directory(directory: Path, name: str | None) -> Contender:
    """A model directory, or an id on the hub. UserError where there is none, or its scores cannot be called so."""
    if name is not None and not NAME.fullmatch(name):
        raise UserError(
            f"--name {name}: a directory is called so: letters, digits, `.`, `_`, `-`; the first a letter or digit"
        )
    place = catalog.model_directory(str(directory))
    return Contender(Model(name or place.name, place))


def contenders(run: "Run") -> list[Contender]:
    """The models that the recipe wants scored, in its order. UserError when one of them is not there."""
    return [Contender(getattr(run.models, name)) for name in dict.fromkeys(run.recipe.eval.models)]
