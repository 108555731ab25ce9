"""A name or a path → recipe, teacher, student or benchmark card, and the weights a card points at.

The four catalogs are folders of YAML, no code. A card is `NAME.yaml`, or `NAME/card.yaml` where it brings files of its
own (the tiny pair's weights). What has a slash or ends in .yaml is a path, relative to where the command runs; anything
else is a name. In a wheel the folders lie inside the package (`distill/_catalog`, so that no generic name leaks into
site-packages); in a clone or an editable install they are the folders at the clone's root.

A registry in code was rejected: a folder listing cannot go stale.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from distill.config import did_you_mean, parse, read_yaml
from distill.errors import UserError
from distill.prompts import load_prompts
from distill.recipe import BenchmarkCard, Recipe, StudentCard, TeacherCard
from distill.section import Section

Kind = Literal["recipe", "teacher", "student", "benchmark"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
S = TypeVar("S", bound=Section)

MODELS: dict[Kind, type[Section]] = {
    "recipe": Recipe,
    "teacher": TeacherCard,
    "student": StudentCard,
    "benchmark": BenchmarkCard,
}
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model"]  # of a model repository, what is read here


def folder(kind: Kind) -> Path:
    """Where the catalog of this kind lies."""
    package = Path(__file__).parent
    packaged = package / "_catalog"
    return (packaged if packaged.is_dir() else package.parent) / f"{kind}s"


def entries(kind: Kind) -> dict[str, Path]:
    """Every name of the catalog and its file, sorted by name."""
    root = folder(kind)
    found = {path.stem: path for path in root.glob("*.yaml")}
    found |= {path.parent.name: path for path in root.glob("*/card.yaml")}
    return dict(sorted(found.items()))


def find(kind: Kind, name_or_path: str) -> Path:
    """The YAML file meant. `UserError` lists the choices for an unknown name."""
    known = entries(kind)
    path = Path(name_or_path).expanduser()
    if "/" in name_or_path or path.suffix in (".yaml", ".yml"):
        if path.is_dir() and not (path / "card.yaml").exists():
            raise UserError(f"{path}: a directory; a {kind} is a YAML file, or a directory with a card.yaml in it")
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
    return _load(MODELS[kind], kind, name_or_path, overrides)


def load_recipe(name_or_path: str, overrides: Sequence[str] = ()) -> Recipe:
    """`overrides` are `KEY=VALUE` as `--set` takes them, applied in order."""
    return _load(Recipe, "recipe", name_or_path, overrides)


def load_teacher(name_or_path: str) -> TeacherCard:
    return _load(TeacherCard, "teacher", name_or_path)


def load_student(name_or_path: str) -> StudentCard:
    return _load(StudentCard, "student", name_or_path)


def load_benchmark(name_or_path: str) -> BenchmarkCard:
    return _load(BenchmarkCard, "benchmark", name_or_path)


def _load(model: type[S], kind: Kind, name_or_path: str, overrides: Sequence[str] = ()) -> S:
    path = find(kind, name_or_path)
    if overrides:
        return parse(model, read_yaml(path), str(path), overrides)
    about = path.stat()
    return _parsed(model, path, (about.st_mtime_ns, about.st_size))


@cache
def _parsed(model: type[S], path: Path, stamp: tuple[int, int]) -> S:
    """A card is parsed once in a process, and again when its file changed (stamp: time and size)."""
    return parse(model, read_yaml(path), str(path))


def check(kind: Kind, name_or_path: str) -> list[str]:
    """Read the entry and everything it names; `UserError` at the first mistake. Returns what is legal but doubtful."""
    if kind == "recipe":
        return check_recipe(load_recipe(name_or_path), prompts=True)
    card = load(kind, name_or_path)
    if isinstance(card, TeacherCard | StudentCard):
        _check_weights("teacher" if isinstance(card, TeacherCard) else "student", name_or_path)
    if isinstance(card, BenchmarkCard) and card.prompts.kind == "file":
        for _ in load_prompts([card.prompts]):
            pass
    return []


def _check_weights(kind: Literal["teacher", "student"], name_or_path: str) -> None:
    """UserError when weights that lie on this machine are incomplete; those of the hub are not looked for."""
    card = load_teacher(name_or_path) if kind == "teacher" else load_student(name_or_path)
    if _local_weights(card, find(kind, name_or_path)):
        resolve_weights(kind, name_or_path)


def check_recipe(
    recipe: Recipe, weights: Sequence[Literal["teacher", "student"]] = ("teacher", "student"), prompts: bool = False
) -> list[str]:
    """Look at what a recipe names: cards, `weights` as far as they lie on this machine, every row of prompt files.

    Returns what is legal but doubtful. Raises UserError at the first mistake.
    """
    teacher, student = load_teacher(recipe.teacher), load_student(recipe.student)
    for kind in weights:
        _check_weights(kind, recipe.teacher if kind == "teacher" else recipe.student)
    for name in recipe.eval.benchmarks:
        load_benchmark(name)
    if prompts:
        for _ in load_prompts([source for source in recipe.prompts if source.kind == "file"]):
            pass
    notes = []
    if recipe.generate.sampling.max_new_tokens >= teacher.context:
        notes.append(f"generate.sampling.max_new_tokens fills {teacher.name}'s whole context of {teacher.context}")
    if recipe.train.max_length > (recipe.train.max_position_embeddings or student.context):
        notes.append(f"train.max_length is past the context of {student.context} that {student.name} declares")
    if teacher.thinking is False and recipe.filter.format:
        notes.append(f"filter.format drops all that {teacher.name} writes: without thinking there is no <think> block")
    return notes


def training_template(recipe: Recipe) -> str | None:
    """The chat template a student is trained with: the recipe's, or its card's; None is the checkpoint's own."""
    return recipe.train.chat_template or load_student(recipe.student).chat_template


# ---- weights


def resolve_weights(kind: Literal["teacher", "student"], name_or_path: str) -> Path:
    """The local directory with a card's config.json and safetensors; a hub id is downloaded first.

    `UserError` names the file that is missing. Nothing is read but the shard index: what is in the files is for the
    engine to judge.
    """
    card = load_teacher(name_or_path) if kind == "teacher" else load_student(name_or_path)
    card_file = find(kind, name_or_path)
    directory = _local_weights(card, card_file)
    if directory is None:
        directory = _download(card.weights, card.revision, kind, name_or_path)
    missing = _missing_file(directory)
    if missing:
        raise UserError(f"{missing} is missing: the weights of {kind} {card.name} ({card_file}) are not complete")
    return directory


def _local_weights(card: TeacherCard | StudentCard, card_file: Path) -> Path | None:
    """The directory that `weights` names, or None for a hub id: `owner/name` where no such directory exists."""
    directory = (card_file.parent / Path(card.weights).expanduser()).resolve()
    if directory.is_dir():
        return directory
    if HUB_ID.fullmatch(card.weights):
        return None
    raise UserError(
        f"{card_file}: weights: no directory {directory}; set it to a directory or to a hub id (owner/name)"
    )


def local_weights(kind: Literal["teacher", "student"], name_or_path: str) -> Path | None:
    """The directory of a card's weights, or None for a hub id. UserError for a directory that is not there."""
    card = load_teacher(name_or_path) if kind == "teacher" else load_student(name_or_path)
    return _local_weights(card, find(kind, name_or_path))


def model_directory(name: str) -> Path:
    """A model directory, or the one of a hub id, downloaded. UserError where there is none, or a file is missing."""
    directory = Path(name).expanduser()
    if not directory.is_dir():
        if not HUB_ID.fullmatch(name) or directory.is_absolute():
            raise UserError(f"{name}: no such model directory; give one, a hub id (owner/name), or a server's address")
        reason = download(name, None)
        if isinstance(reason, str):
            raise UserError(f"{name} is no directory here, and as a hub id it is not on this machine: {reason}")
        directory = reason
    if missing := _missing_file(directory):
        raise UserError(f"{missing} is missing: {name} is not a complete model directory")
    return directory


def _missing_file(directory: Path) -> Path | None:
    if not (directory / "config.json").is_file():
        return directory / "config.json"
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{index}: not a safetensors index (JSON with a weight_map); download it again") from None
        return next((directory / shard for shard in shards if not (directory / shard).is_file()), None)
    return None if any(directory.glob("*.safetensors")) else directory / "model.safetensors"


def download(repo: str, revision: str | None) -> Path | str:
    """The directory of a model on the hub, or why it cannot be had."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError:
        return "accept its licence on the hub and run `hf auth login`"
    except OfflineModeIsEnabled:
        return "HF_HUB_OFFLINE is set: unset it"
    except EntryNotFoundError:
        return "there is no connection to the hub: connect"
    except HfHubHTTPError as error:
        return str(error).split("\n", maxsplit=1)[0]


def _download(repo: str, revision: str | None, kind: Kind, name: str) -> Path:
    fix = download(repo, revision)
    if isinstance(fix, Path):
        return fix
    card_file = find(kind, name)
    own = folder(kind) not in card_file.resolve().parents
    place = f"set weights: in {card_file} to their directory"
    if not own:
        place = f"`distill {kind}s copy {name} my-{kind}.yaml`, set weights: there, and name that file as the {kind}"
    raise UserError(f"the weights {repo} are not on this machine: {fix}; or download them elsewhere, and {place}")


# ---- copies for the user to edit


def copy(kind: Kind, name_or_path: str, destination: Path | None = None) -> Path:
    """Write the entry, comments and all, where the user can edit it; `./NAME.yaml` by default. Never overwrites.

    What is relative to the original is made absolute: a card's weights, and the schema that editors read.
    """
    source = find(kind, name_or_path)
    item = load(kind, name_or_path)
    name = source.parent.name if source.name == "card.yaml" else source.stem
    destination = destination or Path(f"{name}.yaml")
    if destination.is_dir():
        destination /= f"{name}.yaml"
    if destination.exists():
        raise UserError(f"{destination} exists already; give another name: distill {kind}s copy {name_or_path} FILE")
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
    """Replace the first match at a line's beginning: in the text, not through YAML, so that comments survive."""
    return re.sub(f"^{pattern}", lambda _: replacement, text, count=1, flags=re.MULTILINE)
