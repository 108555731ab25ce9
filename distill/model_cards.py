"""The card of a model directory: what a recipe's `teacher:` or `student:` is when it names a model and no card.

Everything is read from config.json and the headers of the weights, and the licence from the front matter of README.md,
where `distill train` writes it. A run directory stands for its student, so that a later recipe takes the student of an
earlier run as its teacher or its base. A card that somebody wrote is compared with the same files.
"""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Literal, TypeVar

from distill import model_families, model_files
from distill.artefacts import RunPaths
from distill.config import parse
from distill.engine.families import FAMILIES
from distill.errors import UserError
from distill.recipe import Architecture, StudentCard, TeacherCard

Kind = Literal["teacher", "student"]
C = TypeVar("C", TeacherCard, StudentCard)

LICENSE = re.compile(r"\A---\n(?:.*\n)*?license: *(\S+)\n(?:.*\n)*?---\n")
MODEL_FILES = ("config.json", "*.safetensors", "*.gguf")
OTHER_SIZE = 1.1  # a card may round its parameters; a factor above this is another model
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")  # in config.json, by family


def directory_of(path: Path) -> Path | None:
    """The model directory that a directory means: itself, or the student of a run; None where it is neither.

    Errors: UserError for a run without a student.
    """
    if any(any(path.glob(pattern)) for pattern in MODEL_FILES):
        return path
    paths = RunPaths(path)
    if not paths.identity.is_file():
        return None
    if not (paths.student / "config.json").is_file():
        raise UserError(f"{path} is a run without a student: finish its training with `distill train` first")
    return paths.student


def teacher_card(directory: Path) -> TeacherCard:
    """The card of a model directory that teaches. Errors: UserError for a directory without a model that is read."""
    card: TeacherCard = _made(TeacherCard, directory, _stamp(directory))
    return card


def student_card(directory: Path) -> StudentCard:
    """The card of a model directory that is trained. Errors: UserError, also for a family that is not trained."""
    card: StudentCard = _made(StudentCard, directory, _stamp(directory))
    return card


def _stamp(directory: Path) -> tuple[int, ...]:
    """Changes with the model, so that a card is made once in a process for each."""
    paths = (directory / "config.json", directory / "README.md", *sorted(directory.glob("*.safetensors")))
    return tuple(
        number for path in paths if path.is_file() for number in (path.stat().st_mtime_ns, path.stat().st_size)
    )


@cache
def _made(model: type[C], directory: Path, stamp: tuple[int, ...]) -> C:
    model_files.model_directory(str(directory))
    config_file = directory / "config.json"
    whole = model_files.read_object(config_file)
    config = model_families.language(whole)
    family, families = whole.get("model_type"), model_families.STUDENTS if model is StudentCard else list(FAMILIES)
    if family not in families and not model_families.in_transformers(family):
        what = "trained" if model is StudentCard else "read"
        raise UserError(
            f"{config_file}: models of type {family!r} are not {what}; expected one of {', '.join(families)}, or "
            f"another causal language model of transformers"
        )
    if family not in families and (part := model_families.composite(whole)):
        raise UserError(
            f"{config_file}: {part} is a model inside a model of type {family!r}; save its language model alone "
            f"(transformers: AutoModelForCausalLM, save_pretrained) and name that directory"
        )
    shapes = model_files.shapes(directory)
    if shapes is None:
        raise UserError(f"{directory}: the header of a .safetensors file cannot be read; copy or download it again")
    values: dict[str, object] = {
        "name": directory.parent.name if RunPaths(directory.parent).student == directory else directory.name,
        "family": family,
        "weights": ".",
        "parameters": sum(shapes.values()) / 1e9,
        "context": config.get("max_position_embeddings", config.get("n_positions")),
        "license": _license(directory),
        "source": "read from its files",
    }
    if model is TeacherCard:
        values["active_parameters"] = _active(shapes, config) / 1e9
    else:
        shape = {key: config[key] for key in Architecture.model_fields if config.get(key) is not None}
        required = {key for key, field in Architecture.model_fields.items() if field.is_required()}
        values["architecture"] = shape if family in families or shape.keys() >= required else None
    if not isinstance(values["context"], int):
        raise UserError(f"{config_file}: max_position_embeddings, the context of the model, is missing; add it")
    return parse(model, values, str(config_file))


def _license(directory: Path) -> str:
    readme = directory / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    found = LICENSE.match(text)
    return found[1] if found else "unknown"


def _active(shapes: Mapping[str, int], config: Mapping[str, object]) -> float:
    """Parameters active for one token: of the routed experts only the share that a token is sent to."""
    routed = sum(size for name, size in shapes.items() if ".experts." in name)
    experts = next((count for key in EXPERTS if isinstance(count := config.get(key), int) and count), None)
    used = config.get("num_experts_per_tok")
    share = used / experts if experts and isinstance(used, int) else 1.0
    return sum(shapes.values()) - routed * (1 - share)


# ---- a card that somebody wrote, and its model


def refuse_another_model(card: TeacherCard | StudentCard, card_file: Path, directory: Path) -> None:
    """Errors: UserError for a card that says something else of a model than its config.json.

    Training, planning and the catalog go by the card's family, the engine by `model_type`. A teacher of a type that the
    engine does not know may be launched as a server; the engine refuses it by name.
    """
    config = model_files.read_object(directory / "config.json")
    claims: dict[str, tuple[object, object]] = {}
    kind_of_model, shape = config.get("model_type"), model_families.language(config)
    if kind_of_model in FAMILIES or model_families.in_transformers(kind_of_model):  # others are named when they load
        claims["family"] = (card.family, kind_of_model)
    if isinstance(card, StudentCard) and card.architecture is not None:
        for key, value in card.architecture.model_dump(exclude_none=True, exclude_unset=True).items():
            claims[f"architecture.{key}"] = (value, shape.get(key, value))
    wrong = [f"{key} is {said}, and {there} there" for key, (said, there) in claims.items() if said != there]
    if wrong:
        raise UserError(
            f"{card_file} contradicts {directory / 'config.json'}: {'; '.join(wrong)}; correct the card, or point "
            f"`weights` at the model that it describes"
        )


def doubts(card: TeacherCard | StudentCard, directory: Path, config: Mapping[str, object]) -> list[str]:
    """Notes about a card whose context or parameters are not those of its model."""
    notes = []
    longest = model_families.language(config).get("max_position_embeddings")
    if isinstance(longest, int) and card.context > longest:
        notes.append(f"context is {card.context:,}, and max_position_embeddings {longest:,} in its config.json")
    if isinstance(card, StudentCard):
        count = model_files.parameters(directory)
        if count and not 1 / OTHER_SIZE < card.parameters * 1e9 / count < OTHER_SIZE:
            notes.append(f"parameters is {card.parameters:g} billion, and its files hold {count / 1e9:.3g} billion")
    return notes
