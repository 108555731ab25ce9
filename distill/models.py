"""A model that answers or learns, resolved once per process: where it is, its mode, what identifies it.

A run has three of them, and everything that needs one takes it from the `Run`:

    teacher   the card's weights or server, in the card's thinking mode
    base      the student before training, asked with the training template: base and student then read the very same
              prompt, and the difference between their scores is the training
    student   the directory that training wrote; it carries its template

Cards are parsed, weights hashed and tokenizers loaded on first use and then kept: resolving by name in
every stage cost a parse each, and two stages could disagree about one model.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import JsonValue

from distill import catalog, model_files
from distill.artefacts import RunPaths
from distill.errors import UserError
from distill.fingerprint import digest, weights_hash
from distill.recipe.server import KEY_VARIABLE, SILENCE, LaunchedServer, checked_header
from distill.thinking import Thinking, variables

if TYPE_CHECKING:
    from distill.chat import Chat
    from distill.recipe import Judge as JudgeSettings
    from distill.recipe import Recipe, StudentCard, TeacherCard, TeacherServer


@dataclass(frozen=True)
class Server:
    """An OpenAI-compatible address.

    model: its name there; None where the only one is meant. key: never shown. key_variable: the environment variable
    that it came from. concurrency: requests under way at once; None leaves it to the caller. stream: whether tokens are
    sent as they are sampled. silence: seconds without one after which a request has failed. extra_body: further fields
    of every request. others: further addresses of the same model. headers: sent with every request; never shown.
    n: whether the samples of a prompt are one request. batch: whether requests are sent as files to a batch API.
    direct: whether requests bypass the proxies of the environment.
    """

    url: str
    model: str | None = None
    key: str | None = field(default=None, repr=False)
    key_variable: str = KEY_VARIABLE
    concurrency: int | None = None
    stream: bool = True
    silence: float = SILENCE
    extra_body: Mapping[str, JsonValue] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    n: bool = False
    batch: bool = False
    direct: bool = False

    @classmethod
    def of(cls, server: "TeacherServer", thinking: Thinking | None) -> "Server":
        """The server that a recipe or a card names. thinking: sent as the variables that templates read.

        Errors: UserError when the variable with the key is not set; the default one may be missing.
        """
        key = os.environ.get(server.api_key_env)
        if not key and server.api_key_env != KEY_VARIABLE:
            raise UserError(
                f"server.api_key_env: the environment variable {server.api_key_env} is not set; "
                f"export {server.api_key_env}=… with the API key"
            )
        url, *others = (server.url,) if isinstance(server.url, str) else server.url
        return cls(
            url,
            server.model,
            key,
            server.api_key_env,
            concurrency=server.concurrency,
            stream=server.stream,
            silence=server.silence,
            extra_body=in_mode(server.extra_body, thinking),
            others=tuple(others),
            n=server.n,
            batch=server.batch,
            headers={name: _from_environment(name, value) for name, value in server.headers.items()},
        )

    @property
    def without_thinking(self) -> bool:
        """Whether it is asked for answers without reasoning, by the variables of `thinking: false`."""
        sent, off = self.extra_body.get("chat_template_kwargs"), variables(False)
        return isinstance(sent, dict) and off.items() <= sent.items()

    @property
    def identity(self) -> dict[str, JsonValue]:
        """What decides the answers: the model and the fields of the request. The address is no part of it."""
        identity: dict[str, JsonValue] = {"model": self.model}
        if self.extra_body:
            identity["extra_body"] = dict(self.extra_body)
        return identity


def in_mode(extra_body: Mapping[str, JsonValue], thinking: Thinking | None) -> dict[str, JsonValue]:
    """The further fields of a request, with the variables by which chat templates choose the thinking mode."""
    body = dict(extra_body)
    if thinking is not None:
        given = body.get("chat_template_kwargs")
        chosen = given if isinstance(given, dict) else {}
        body["chat_template_kwargs"] = {**variables(thinking), **chosen}
    return body


@dataclass(frozen=True)
class Launch:
    """A server that is started with the weights in `directory`. context: of the card, in tokens. log: the file that its
    output is appended to; None for a temporary one."""

    settings: LaunchedServer
    directory: Path
    context: int
    log: Path | None = None

    @property
    def identity(self) -> dict[str, JsonValue]:
        """What decides the numbers beside the weights: the engine, its arguments and the fields of the request."""
        identity: dict[str, JsonValue] = {"engine": self.settings.launch}
        if self.settings.arguments:
            identity["arguments"] = list(self.settings.arguments)
        if self.settings.extra_body:
            identity["extra_body"] = dict(self.settings.extra_body)
        return identity


def _from_environment(name: str, value: str) -> str:
    """A header's value; `$NAME` is that environment variable's. Errors: UserError when it is not set, or HTTP cannot
    carry its value."""
    variable, content = ("", value) if not value.startswith("$") else (value[1:], os.environ.get(value[1:], "").strip())
    if variable and not content:
        raise UserError(f"server.headers: {name}: the environment variable {variable} is not set")
    try:
        return checked_header(name, content)
    except ValueError as error:
        raise UserError(
            f"server.headers: {error}{f' (environment variable {variable})' if variable else ''}"
        ) from error


@dataclass(eq=False)
class Model:
    """name: what its scores are called. place: a model directory, a server, or a server that is started with one.
    template: a built-in training template or a .jinja file in place of the directory's own. thinking: the template's
    mode, None for its default. card: of the teacher that a server at an address has."""

    name: str
    place: Path | Server | Launch
    template: str | None = None
    thinking: Thinking | None = None
    card: str | None = None

    @property
    def is_remote(self) -> bool:
        """Whether it is behind a server."""
        return not isinstance(self.place, Path)

    @property
    def directory(self) -> Path:
        """The model directory. A server at an address has none: that is asserted."""
        if isinstance(self.place, Launch):
            return self.place.directory
        assert isinstance(self.place, Path), f"{self.name} is behind a server"
        return self.place

    @cached_property
    def weights(self) -> str:
        """A hash over configuration, tokenizer and weights (`fingerprint.weights_hash`)."""
        return weights_hash(self.directory)

    @cached_property
    def identity(self) -> dict[str, JsonValue]:
        """What the fingerprint of a stage says of the model: weights, the template where it is not the directory's own,
        its date where it asks for one, and the mode where one was chosen. The address of a server is no part of it."""
        if isinstance(self.place, Server):
            return self.place.identity
        from distill.chat import TODAY, read_template, reads_date

        template = digest(read_template(self.template)) if self.template else "own"
        mode: dict[str, JsonValue] = {} if self.thinking is None else {"thinking": self.thinking}
        engine = self.place.identity if isinstance(self.place, Launch) else {}
        local = isinstance(self.place, Path)  # a server renders by itself
        date: dict[str, JsonValue] = {"date": TODAY} if local and reads_date(self.directory, self.template) else {}
        return {"weights": self.weights, "chat_template": template} | date | mode | engine

    @cached_property
    def chat(self) -> "Chat":
        """The tokenizer with the template, in the model's mode; behind a server, that of the teacher's card.

        Errors: UserError when it cannot be used.
        """
        from distill.chat import Chat

        directory = catalog.resolve_tokenizer(self.card) if self.is_remote and self.card else self.directory
        return Chat.load(directory, self.template, self.thinking)


def teacher_of(
    name: str,
    card_name: str,
    server: "TeacherServer | LaunchedServer | None" = None,
    thinking: Thinking | None = None,
    log: Path | None = None,
) -> Model:
    """The model of a teacher card. server: in place of the card's. thinking: in place of the card's mode. log: the file
    that a launched server's output is appended to; None for a temporary one.

    Errors: as `Models.teacher`.
    """
    card = catalog.load_teacher(card_name)
    mode = card.thinking if thinking is None else thinking
    server = server or card.server
    if server is not None and not isinstance(server, LaunchedServer):
        return Model(name, Server.of(server, mode), thinking=mode, card=card_name)
    directory = catalog.resolve_weights("teacher", card_name)
    return Model(name, Launch(server, directory, card.context, log) if server else directory, thinking=mode)


def judge_is_directory(settings: "JudgeSettings") -> bool:
    """Whether a recipe's judge is a model directory: a path of a directory, and not a name of the catalog or a card."""
    name = settings.teacher or ""
    return name not in catalog.entries("teacher") and Path(name).expanduser().is_dir() and bool(name)


def judge_of(settings: "JudgeSettings", log: Path | None = None) -> Model:
    """The judge that a recipe names: behind a server, on a launched one, or in a directory. log: as of `teacher_of`.

    Errors: UserError for an unknown card, a directory without a model, or a missing key.
    """
    if settings.teacher is None:
        server = settings.server
        assert server is not None and not isinstance(server, LaunchedServer), "checked by the recipe"
        return Model("judge", Server.of(server, None))
    if settings.server is None and judge_is_directory(settings):
        return Model("judge", model_files.model_directory(str(Path(settings.teacher).expanduser())))
    return teacher_of("judge", settings.teacher, settings.server, log=log)


class Models:
    """The models of one recipe. root: the run directory, where training writes the student."""

    def __init__(self, recipe: "Recipe", root: Path) -> None:
        self._recipe, self._root = recipe, root

    @cached_property
    def teacher_card(self) -> "TeacherCard":
        """The recipe's teacher card. Errors: UserError for an unknown name or a broken card."""
        return catalog.load_teacher(self._recipe.teacher)

    @cached_property
    def student_card(self) -> "StudentCard":
        """The recipe's student card. Errors: UserError for an unknown name or a broken card."""
        return catalog.load_student(self._recipe.student)

    @cached_property
    def teacher(self) -> Model:
        """The teacher, behind a server or in a directory; a hub id is downloaded first. A model that teaches itself
        answers with the training template.

        Errors: UserError when its weights are not complete, its server's key is missing, or a server has a template.
        """
        recipe = self._recipe
        if self.teaches_itself:
            return Model("teacher", self.base.place, template=recipe.teacher_template or self.base.template)
        model = teacher_of("teacher", recipe.teacher, recipe.server, log=RunPaths(self._root).server_log)
        if recipe.teacher_template is None:
            return model
        if model.is_remote:
            raise UserError(
                "teacher_template: a server renders prompts with its own template; remove teacher_template, or `server`"
            )
        return replace(model, template=recipe.teacher_template)

    @property
    def teaches_itself(self) -> bool:
        """Whether `teacher` and `student` name the same model directory."""
        recipe = self._recipe
        same = recipe.teacher == recipe.student and recipe.server is None
        return same and catalog.model_directory("teacher", recipe.teacher) is not None

    @cached_property
    def teachers(self) -> dict[str, Model]:
        """Further teachers by the task of the prompts that are routed to them (`train.objective.teachers`).

        Errors: as `teacher`.
        """
        log, objective = RunPaths(self._root).server_log, self._recipe.train.objective
        return {task: teacher_of(f"teacher of {task}", name, log=log) for task, name in objective.task_teachers.items()}

    @cached_property
    def judge(self) -> Model:
        """The judge, where the recipe has one. Errors: as `judge_of`."""
        assert self._recipe.judge is not None, "check that the recipe has a judge first"
        return judge_of(self._recipe.judge, RunPaths(self._root).server_log)

    @cached_property
    def base(self) -> Model:
        """The student before training, with the training template. Errors: as `teacher`."""
        place = catalog.resolve_weights("student", self._recipe.student)
        return Model("base", place, template=self.training_template)

    @property
    def student(self) -> Model:
        """The student that training wrote. Errors: UserError when there is none yet."""
        directory = self._root / "student"
        if not (directory / "config.json").is_file():
            raise UserError(
                f"{directory} holds no model: run `distill train` first, or leave `student` out of eval.models"
            )
        return self._student

    @cached_property
    def _student(self) -> Model:
        return Model("student", self._root / "student")

    @property
    def training_template(self) -> str | None:
        """The template that the student is trained with: the recipe's, or its card's; None is the checkpoint's own."""
        return catalog.training_template(self._recipe)
