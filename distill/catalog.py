"""A name or a path → recipe, teacher, student or benchmark card, and the weights a card points at.

The four catalogs are folders of YAML, no code. A card is `NAME.yaml`, or `NAME/card.yaml` if it has files of its own
(the tiny pair's weights). An argument with a slash, or one that ends in .yaml, is a path relative to the current
directory; any other is a name. A teacher or student may also be a model directory or a run directory, whose card is
read from the model (`distill.model_cards`). In a wheel the folders are inside the package (`distill/_catalog`, so that
no generic name leaks into site-packages); in a clone or an editable install they are the folders at the clone's root.

A registry in code was rejected: a folder listing cannot go stale.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from distill import gguf_files, model_cards, model_files
from distill.chat import read_template
from distill.config import did_you_mean, parse, read_yaml
from distill.errors import UserError
from distill.prompts import PromptCounts, load_prompts
from distill.recipe import BenchmarkCard, LaunchedServer, Price, Recipe, StudentCard, TeacherCard, TeacherServer
from distill.recipe.sources import MixedSource, PromptSource, TraceSource
from distill.section import Section

Kind = Literal["recipe", "teacher", "student", "benchmark"]
S = TypeVar("S", bound=Section)

MODELS: dict[Kind, type[Section]] = {
    "recipe": Recipe,
    "teacher": TeacherCard,
    "student": StudentCard,
    "benchmark": BenchmarkCard,
}
PROBLEM_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


def folder(kind: Kind) -> Path:
    """The directory of the catalog of this kind."""
    package = Path(__file__).parent
    packaged = package / "_catalog"
    return (packaged if packaged.is_dir() else package.parent) / f"{kind}s"


def entries(kind: Kind) -> dict[str, Path]:
    """Every name of the catalog and its file, sorted by name."""
    root = folder(kind)
    files = {path.stem: path for path in root.glob("*.yaml")}
    files |= {path.parent.name: path for path in root.glob("*/card.yaml")}
    return dict(sorted(files.items()))


def find(kind: Kind, name_or_path: str) -> Path:
    """The YAML file of a name or a path. Errors: UserError, which lists the choices for an unknown name."""
    known = entries(kind)
    path = Path(name_or_path).expanduser()
    if "/" in name_or_path or path.suffix in (".yaml", ".yml"):
        if path.is_dir() and not (path / "card.yaml").exists():
            model = ", a model" if kind in ("teacher", "student") else ""
            raise UserError(
                f"{path}: a directory; a {kind} is a YAML file{model}, or a directory with a card.yaml in it"
            )
        path = path / "card.yaml" if path.is_dir() else path
        if not path.exists():
            hint = did_you_mean(path.stem, list(known))
            raise UserError(f"{path}: no such {kind} file (the current directory is {Path.cwd()}){hint}")
        return path
    if name_or_path not in known:
        choices = ", ".join(known) or "none"
        hint = did_you_mean(name_or_path, list(known))
        raise UserError(f"no {kind} is named {name_or_path!r}{hint} (choices: {choices}; or the path of a YAML file)")
    return known[name_or_path]


def load(kind: Kind, name_or_path: str, overrides: Sequence[str] = ()) -> Section:
    """Parse an entry of any catalog. Errors: UserError."""
    return _load(MODELS[kind], kind, name_or_path, overrides)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Parse a recipe. overrides: `KEY=VALUE` as `--set` takes them, applied in order. Errors: UserError."""
    return _load(Recipe, "recipe", name_or_path, overrides)


def load_teacher(name_or_path: str) -> TeacherCard:
    """Parse a teacher card, or make that of a model directory. Errors: UserError."""
    if (directory := model_directory("teacher", name_or_path)) is not None:
        return model_cards.teacher_card(directory)
    return _load(TeacherCard, "teacher", name_or_path)


def load_student(name_or_path: str) -> StudentCard:
    """Parse a student card, or make that of a model directory. Errors: UserError."""
    if (directory := model_directory("student", name_or_path)) is not None:
        return model_cards.student_card(directory)
    return _load(StudentCard, "student", name_or_path)


def model_directory(kind: Literal["teacher", "student"], name_or_path: str) -> Path | None:
    """The model directory that is named in place of a card: itself, that of a GGUF file, or the student of a run. None
    for a card.

    A name of the catalog counts more than a directory of that name, and a card of this kind in a directory more than
    the model beside it. Errors: UserError for a run without a student.
    """
    path = Path(name_or_path).expanduser()
    if name_or_path in entries(kind) or not name_or_path:
        return None
    if path.suffix == gguf_files.SUFFIX and not path.is_dir():
        return model_files.find_directory(name_or_path, Path())
    if not path.is_dir():
        return None
    if (path / "card.yaml").exists():
        card = read_yaml(path / "card.yaml")
        is_teacher = isinstance(card, Mapping) and "active_parameters" in card
        if is_teacher == (kind == "teacher") or not (path / "config.json").is_file():
            return None
    return model_cards.directory_of(path)


def _card_file(kind: Literal["teacher", "student"], name_or_path: str) -> Path:
    """The file that `weights` is relative to, and that messages name."""
    directory = model_directory(kind, name_or_path)
    return find(kind, name_or_path) if directory is None else directory / "config.json"


def load_benchmark(name_or_path: str) -> BenchmarkCard:
    """Parse a benchmark card. Errors: UserError."""
    return _load(BenchmarkCard, "benchmark", name_or_path)


def _load(model: type[S], kind: Kind, name_or_path: str, overrides: Sequence[str] = ()) -> S:
    path = find(kind, name_or_path)
    if overrides:
        return parse(model, read_yaml(path), str(path), overrides)
    about = path.stat()
    card: S = _parsed(model, path, (about.st_mtime_ns, about.st_size))
    return card


@cache
def _parsed(model: type[S], path: Path, stamp: tuple[int, int]) -> S:
    """A card is parsed once in a process, and again when its file changed (stamp: time and size)."""
    return parse(model, read_yaml(path), str(path))


def check(kind: Kind, name_or_path: str) -> list[str]:
    """Read the entry and everything it names. Returns what is legal but doubtful.

    Errors: UserError at the first mistake.
    """
    if kind == "recipe":
        return check_recipe(load_recipe(name_or_path), prompts=True)
    if kind in ("teacher", "student"):
        return _check_weights(kind, name_or_path)
    card = load(kind, name_or_path)
    if isinstance(card, BenchmarkCard) and all(source.kind == "file" for source in card.sources):
        return _check_prompts(card.sources, card.problems)
    return []


def _check_weights(kind: Literal["teacher", "student"], name_or_path: str) -> list[str]:
    """Notes about weights on this machine; those of the hub are not looked for.

    Errors: UserError when they are incomplete, or the card says something else of them than their config.json.
    """
    card = load_teacher(name_or_path) if kind == "teacher" else load_student(name_or_path)
    card_file = _card_file(kind, name_or_path)
    if (directory := _local_weights(card, card_file)) is None:
        return []
    resolve_weights(kind, name_or_path)
    config = model_files.read_object(directory / "config.json")
    return [f"{card.name}: {note}" for note in model_cards.doubts(card, directory, config)]


def _check_prompts(sources: Sequence[PromptSource], expected: int | None = None) -> list[str]:
    """Read every row of the sources; notes about what may not be meant. expected: the number of problems that a card
    says. Errors: UserError."""
    counts = PromptCounts()
    unmixed = [source.model_copy(update={"weight": None}) for source in sources]  # a mixture leaves rows unread
    for _ in load_prompts(unmixed, counts):
        pass
    if expected is not None and counts.seen.total() != expected:
        raise UserError(
            f"problems is {expected:,}, and the file has {counts.seen.total():,}: correct `problems`, or leave it out"
        )
    return counts.notes()


def _check_traces(sources: Sequence[TraceSource | MixedSource]) -> None:
    """Read every trace of files. Errors: UserError naming the row."""
    from distill.traces.published import read_published

    for source in sources:
        if source.kind == "file" or (source.kind == "hub" and source.local):
            for _ in read_published(source):
                pass


def is_problem_file(name: str) -> bool:
    """Whether a name among benchmarks is that of a file or directory with problems, and not of a card."""
    return Path(name).is_dir() or name.removesuffix(".gz").removesuffix(".zst").endswith(PROBLEM_FILES)


def _check_names(recipe: Recipe) -> list[str]:
    """Look at the cards and files that settings of the stages name. Returns which runs are not there yet, and which
    benchmarks of `decontaminate` may change unnoticed. Errors: UserError."""
    notes = []
    if (decontaminate := recipe.filter.decontaminate) is not None:
        for name in decontaminate.benchmarks or recipe.eval.benchmarks:
            try:
                if not is_problem_file(name):
                    notes += _not_pinned(load_benchmark(name), recipe)
                elif not Path(name).exists():
                    raise UserError(f"no file {name}; correct the path")
            except UserError as error:
                raise UserError(f"filter.decontaminate.benchmarks: {error}") from error
    if recipe.judge is not None and recipe.judge.teacher is not None and not Path(recipe.judge.teacher).is_dir():
        try:
            load_teacher(recipe.judge.teacher)
        except UserError as error:
            raise UserError(f"judge.teacher: {error}") from error
    for template in (recipe.teacher_template, *(training.chat_template for training in recipe.train.trainings)):
        if template is not None:
            read_template(template)
    from distill.traces.published import notes_on_run

    mixed = (source for training in recipe.train.trainings for source in training.data)
    for source in (*recipe.traces, *mixed):
        if source.kind == "run":
            notes += notes_on_run(Path(source.path))
    return notes


def _not_pinned(card: BenchmarkCard, recipe: Recipe) -> list[str]:
    """A note for a benchmark of `decontaminate` that is a dataset of the hub without a revision."""
    sources = () if recipe.eval.sources.get(card.name) else card.sources
    names = [source.dataset for source in sources if source.kind == "hub" and not (source.revision or source.local)]
    return [
        f"filter.decontaminate: the card of {card.name} names no `revision` of {name}, so a change of its problems is "
        f"noticed only while there are traces to judge; copy the card and set one, or name a file in eval.sources"
        for name in dict.fromkeys(names)
    ]


def check_recipe(
    recipe: Recipe, weights: Sequence[Literal["teacher", "student"]] = ("teacher", "student"), prompts: bool = False
) -> list[str]:
    """Look at what a recipe names: cards, `weights` as far as they are on this machine, every row of prompt files.

    Returns what is legal but doubtful. Errors: UserError at the first mistake.
    """
    teacher, student = load_teacher(recipe.teacher), load_student(recipe.student)
    notes = []
    server = server_of(recipe)
    _check_scoring(recipe, teacher, server)
    if (budget := recipe.generate.budget) is not None:
        remote = isinstance(server, TeacherServer)
        if budget.cost is not None and (price_of(recipe) if remote else recipe.price_per_hour) is None:
            key = "server.price" if remote else "price_per_hour"
            raise UserError(f"generate.budget.cost needs a price: set {key}, or remove the cost")
        if isinstance(server, TeacherServer) and server.n:
            raise UserError(
                "generate.budget needs the tokens of each sample, which server.n hides: remove one of the two"
            )
    for kind in weights:
        if kind == "teacher" and isinstance(server, TeacherServer):
            continue
        notes += _check_weights(kind, recipe.teacher if kind == "teacher" else recipe.student)
    for name in recipe.eval.benchmarks:
        load_benchmark(name)
    if prompts:
        gym = [source.model_copy(update={"limit": 1}) for source in recipe.prompts if source.kind == "reasoning_gym"]
        notes += _check_prompts(
            [*gym, *(each for each in recipe.prompts if each.kind == "file" or (each.kind == "hub" and each.local))]
        )
        _check_traces((*recipe.traces, *(each for training in recipe.train.trainings for each in training.data)))
        notes += _check_names(recipe)
    if recipe.prompts and recipe.reads_traces and recipe.generate.sampling.max_new_tokens >= teacher.context:
        notes.append(f"generate.sampling.max_new_tokens fills {teacher.name}'s whole context of {teacher.context}")
    context = student.context
    for key, training in recipe.train.keyed():
        context = training.max_position_embeddings or context  # a phase keeps that of the phase before
        if training.max_length > context:
            notes.append(f"{key}.max_length is past the context of {context} that {student.name} declares")
    if teacher.thinking is False and recipe.filter.format and recipe.reads_traces:
        notes.append(
            f"filter.format drops every trace of {teacher.name}: without thinking it writes no <think> block; set "
            f"filter.format to null"
        )
    return notes


def _check_scoring(recipe: Recipe, teacher: TeacherCard, server: TeacherServer | LaunchedServer | None) -> None:
    """Refuse a server that cannot say what the objectives read of the teacher. Errors: UserError."""
    scored = [each.objective for each in recipe.train.trainings if each.objective.teacher_top_k is not None]
    written = [objective for objective in scored if objective.rollout_settings is not None]
    servers = {recipe.teacher: server} if written else {}
    servers |= {name: load_teacher(name).server for each in written for name in each.task_teachers.values()}
    if started := [name for name, its in servers.items() if isinstance(its, LaunchedServer)]:
        raise UserError(
            f"train.objective.kind {written[0].kind} asks {started[0]} for the probabilities of the student's text, "
            f"which a server that distill starts (server.launch) does not give: remove `server` to use the local "
            f"engine, or set server.url to that of a vLLM"
        )
    if server is None or not scored:
        return
    reads = f"train.objective.kind {scored[0].kind} reads the teacher's probabilities"
    of_traces = any(objective.reads_data for objective in scored)  # those of rollouts are asked for while training
    if of_traces and recipe.generate.logprobs is None and not recipe.traces:  # vLLM may score published traces
        raise UserError(
            f"{reads}, which a server gives beside its answers: set generate.logprobs, remove `server`, or set "
            f"train.objective.kind to `sft`"
        )
    if teacher.weights is None:
        raise UserError(
            f"{reads} and needs its tokenizer: set `weights:` in the card of {teacher.name} to its directory or hub id"
        )


def server_of(recipe: Recipe) -> TeacherServer | LaunchedServer | None:
    """The server that has a recipe's teacher: the recipe's, or its card's; None is the local engine."""
    return recipe.server or load_teacher(recipe.teacher).server


def price_of(recipe: Recipe) -> Price | None:
    """The price of tokens of a recipe's teacher: at the server that is named, else what its card says of a provider.

    None for a teacher on this machine, which costs hours and not tokens.
    """
    server = server_of(recipe)
    return (server.price or load_teacher(recipe.teacher).price) if isinstance(server, TeacherServer) else None


def training_template(recipe: Recipe) -> str | None:
    """The chat template a student is trained with: the recipe's, or its card's; None is the checkpoint's own."""
    return recipe.train.template or load_student(recipe.student).chat_template


# ---- weights


def resolve_weights(kind: Literal["teacher", "student"], name_or_path: str) -> Path:
    """The local directory with a card's config.json and safetensors; a hub id is downloaded first.

    Errors: UserError naming the file that is missing, or of a kind that is not read (`distill.model_files`), and for a
    card of another model.
    """
    card = load_teacher(name_or_path) if kind == "teacher" else load_student(name_or_path)
    card_file = _card_file(kind, name_or_path)
    directory = _local_weights(card, card_file)
    if card.weights is None:
        raise UserError(
            f"{card_file} names a server and no weights, so {card.name} does not run on this machine; use that "
            f"server, or another with the model (vLLM, SGLang, llama.cpp, an API: `server:` in the recipe), or set "
            f"`weights:`"
        )
    if directory is None:
        directory = _download(card.weights, card.revision, kind, name_or_path)
    if problem := model_files.first_problem(directory):
        raise UserError(f"{problem}: the weights of {kind} {card.name} ({card_file}) are not complete")
    model_cards.refuse_another_model(card, card_file, directory)
    return directory


def resolve_tokenizer(name_or_path: str, kind: Literal["teacher", "student"] = "teacher") -> Path:
    """The local directory with a tokenizer whose model is not needed: of a teacher that is asked through a server, of a
    student that tokens are counted for. Of a hub id only the files beside the weights are fetched. Errors: UserError.
    """
    card = load_teacher(name_or_path) if kind == "teacher" else load_student(name_or_path)
    directory = _local_weights(card, _card_file(kind, name_or_path))
    if card.weights is None:
        raise UserError(f"the card of {card.name} names no `weights:`, whose tokenizer is needed")
    return directory or _download(card.weights, card.revision, kind, name_or_path, model_files.TOKENIZER_FILES)


def _local_weights(card: TeacherCard | StudentCard, card_file: Path) -> Path | None:
    """The directory that `weights` names; None for a hub id (`owner/name` where no such directory exists), and for a
    teacher that has a server only."""
    if card.weights is None:
        return None
    try:
        return model_files.find_directory(card.weights, card_file.parent)
    except UserError as error:
        raise UserError(f"{card_file}: weights: {error}") from error


def local_weights(kind: Literal["teacher", "student"], name_or_path: str) -> Path | None:
    """The directory of a card's weights, or None for a hub id. Errors: UserError when there is no such directory."""
    card = load_teacher(name_or_path) if kind == "teacher" else load_student(name_or_path)
    return _local_weights(card, _card_file(kind, name_or_path))


def _download(
    repo: str, revision: str | None, kind: Kind, name: str, files: Sequence[str] = model_files.HUB_FILES
) -> Path:
    place = model_files.download(repo, revision, files)
    if isinstance(place, Path):
        return place
    card_file = find(kind, name)
    fix = f"set `weights:` in {card_file} to their directory"
    if folder(kind) in card_file.resolve().parents:
        fix = f"`distill {kind}s copy {name} my-{kind}.yaml`, set `weights:` there, and name that file as the {kind}"
    raise UserError(f"the weights {repo} are not on this machine: {place}; or download them elsewhere, and {fix}")


# ---- copies for the user to edit


def copy(kind: Kind, name_or_path: str, destination: Path | None = None) -> Path:
    """Write the entry with its comments to a file that the user can edit; `./NAME.yaml` by default. Never overwrites.

    Paths relative to the original become absolute: a card's weights, and the schema that editors read. Errors:
    UserError when the file exists or its directory does not.
    """
    source = find(kind, name_or_path)
    item = load(kind, name_or_path)
    name = source.parent.name if source.name == "card.yaml" else source.stem
    destination = destination or Path(f"{name}.yaml")
    if destination.is_dir():
        destination /= f"{name}.yaml"
    if destination.exists():
        raise UserError(f"{destination} already exists; give another name: distill {kind}s copy {name_or_path} FILE")
    if not destination.parent.is_dir():
        raise UserError(f"{destination.parent}: no such directory; create it first")
    text = source.read_text(encoding="utf-8")
    schema = "# yaml-language-server: $schema="
    text = _with_line(re.escape(schema) + r"(?!/)", f"{schema}{source.parent}/", text)
    if isinstance(item, TeacherCard | StudentCard) and (weights := _local_weights(item, source)):
        text = _with_line(r"weights:.*$", f"weights: {json.dumps(str(weights))}", text)
    if re.fullmatch(r"[a-z0-9][a-z0-9._-]*", destination.stem):
        text = _with_line(r"name:.*$", f'name: "{destination.stem}"', text)
    destination.write_text(text, encoding="utf-8")
    return destination


def _with_line(pattern: str, replacement: str, text: str) -> str:
    """Replace the first match at the beginning of a line: in the text, not through YAML, to keep comments."""
    return re.sub(f"^{pattern}", lambda _: replacement, text, count=1, flags=re.MULTILINE)
