"""`distill push`: a run's kept traces and its student to the Hugging Face Hub, each with its card.

Everything is checked before anything is sent: the stages are finished, their files are as recorded, the token is
there, no repository of that name holds something else. Each repository gets one commit, so that a reader sees all of it
or nothing. Resuming needs no record of ours: the hub knows by content which large files it has.

A file `distill.json` in the repository names the run that it came from: the recipe's name, and when the run directory
was created. A repository that has other files and not this one is refused: a push would mix two data sets. The commit
that adds the files of a run deletes its earlier ones that it no longer has: parts of a larger data set, shards of a
larger model, the weights of an adapter.
"""

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import yaml

from distill.artefacts import FilterSummary, RunPaths, TrainSummary
from distill.catalog import load_recipe
from distill.errors import UserError, WorkError
from distill.recipe import Recipe
from distill.record import StageRecord, read_identity

if TYPE_CHECKING:
    from huggingface_hub import HfApi

REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ORIGIN = "distill.json"
PRODUCTS = {  # files that are deleted from the run's repository once the run no longer has them
    "dataset": re.compile(r"data/.*\.parquet"),
    "model": re.compile(r"[^/]*\.(safetensors|bin)(\.index\.json)?|adapter_config\.json"),
}
INITIAL = {".gitattributes", "README.md"}  # that the hub may have put into a new repository
SIZES = ((1_000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))


@dataclass(frozen=True)
class Upload:
    """One repository. files: path in the repository → a local file, or the content."""

    repository: str
    kind: Literal["dataset", "model"]
    files: dict[str, Path | bytes]


def push(run: Path, dataset: str | None, model: str | None, private: bool, force: bool) -> Iterator[str]:
    """Send what is asked for, and yield the address of each repository as it is complete.

    Errors: UserError when something is missing, unfinished or damaged, or the hub refuses; WorkError when it fails or
    cannot be reached: a rerun resumes.
    """
    if dataset is None and model is None:
        raise UserError("nothing to push: name --dataset USER/NAME, --model USER/NAME, or both")
    for option, name in (("--dataset", dataset), ("--model", model)):
        if name is not None and not REPOSITORY.fullmatch(name):
            raise UserError(f"{option} {name}: not the id of a repository; write it as USER/NAME")
    uploads = _uploads(run, dataset, model)
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise UserError(
            "no token for the hub: set HF_TOKEN to one that may write (https://huggingface.co/settings/tokens)"
        )
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        raise UserError("HF_HUB_OFFLINE is set: unset it to push")
    api = HfApi(token=token)
    stale: list[list[str]] = []
    for upload in uploads:
        with _reasons(upload):
            stale.append(_stale(api, upload, force))
    for upload, names in zip(uploads, stale, strict=True):
        with _reasons(upload):
            yield _send(api, upload, names, private)


def _uploads(run: Path, dataset: str | None, model: str | None) -> list[Upload]:
    paths = RunPaths(run)
    if not paths.recipe.is_file():
        raise UserError(f"{run} is not a run directory (no recipe.yaml in it); `distill run RECIPE` makes one")
    recipe = load_recipe(str(paths.recipe))
    identity = read_identity(run, "RUN")
    created = identity.created if identity else None
    checksum = hashlib.sha256(paths.recipe.read_bytes()).hexdigest()
    origin = json.dumps({"run": recipe.name, "created": created, "recipe": checksum}) + "\n"
    common: dict[str, Path | bytes] = {ORIGIN: origin.encode(), "recipe.yaml": paths.recipe}
    uploads = []
    if dataset is not None:
        record = _finished(run, "filter")
        filtered = FilterSummary.model_validate_json(json.dumps(record.summary))
        files = {f"data/{path.name}": path for path in sorted(paths.kept.glob("part-*.parquet"))}
        if not files or not filtered.kept:
            raise UserError(f"{paths.kept}: no kept traces to push; loosen the filters and rerun `distill filter`")
        card = dataset_card(dataset, recipe, filtered).encode()
        uploads.append(Upload(dataset, "dataset", {**common, **files, "README.md": card}))
    if model is not None:
        TrainSummary.model_validate_json(json.dumps(_finished(run, "train").summary))
        files = {
            path.relative_to(paths.student).as_posix(): path
            for path in sorted(paths.student.rglob("*"))
            if path.is_file() and not path.name.startswith(".")
        }
        for name in ("config.json", "README.md"):
            if name not in files and not (name == "config.json" and "adapter_config.json" in files):
                raise UserError(f"{paths.student / name}: no such file; rerun `distill run` with this recipe")
        uploads.append(Upload(model, "model", {**common, **files}))
    return uploads


def _finished(run: Path, stage: str) -> StageRecord:
    """The record of a stage whose files are as recorded. Errors: UserError."""
    fresh = f"`distill {stage} {run / 'recipe.yaml'} --run-dir {run} --fresh {stage}` starts it over"
    record = StageRecord.read_if_there(RunPaths(run).record(stage), fresh)
    if record is None or record.finished is None:
        raise UserError(
            f"{run}: the stage {stage} is not finished; `distill run {run / 'recipe.yaml'} --run-dir {run}` finishes it"
        )
    for name, file in record.files.items():
        if (what := file.damage(run / name)) is not None:
            raise UserError(f"{run / name} {what}; `distill {stage} --verify` with this recipe recreates it")
    return record


def dataset_card(repository: str, recipe: Recipe, filtered: FilterSummary) -> str:
    """The README.md of a data set of kept traces: front matter for the hub, origin, filters, columns."""
    size = next((name for most, name in SIZES if filtered.kept < most), "n>1M")
    front = {
        "pretty_name": repository.partition("/")[2],
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": ["reasoning", "distillation", "synthetic"],
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": "data/*.parquet"}]}],
    }
    rows = "\n".join(
        f"| {step.filter} | {step.entered:,} | {step.dropped:,} | {step.kept:,} |" for step in filtered.funnel
    )
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---

# {front["pretty_name"]}

{filtered.kept:,} reasoning traces of `{recipe.teacher}`, kept by the filters of the recipe `{recipe.name}` out of
{filtered.total:,}. `recipe.yaml` has every setting.

| filter | entered | dropped | kept |
|---|---|---|---|
{rows}

`messages` is the conversation, with the reasoning inside `<think>…</think>` of its last turn; `reasoning` and
`response` are its two parts, `answer` is the gold answer, `verdicts` says what each filter decided. Check the licences
of the teacher and of the problems (`source`) before you publish a model that is trained on it.

    datasets.load_dataset("{repository}", split="train")
"""


# ---- the hub


def _stale(api: "HfApi", upload: Upload, force: bool) -> list[str]:
    """The files of an earlier push of this run that it no longer has. Errors: UserError where the repository holds
    something else; with `force`, whose files stay, none are stale."""
    from huggingface_hub.errors import RepositoryNotFoundError

    api.whoami(cache=False)
    try:
        info = api.repo_info(upload.repository, repo_type=upload.kind)
    except RepositoryNotFoundError:
        return []
    names = {file.rfilename for file in getattr(info, "siblings", None) or ()}
    if names <= INITIAL:
        return []
    theirs = None
    if ORIGIN in names:
        with tempfile.TemporaryDirectory() as directory:
            path = api.hf_hub_download(upload.repository, ORIGIN, repo_type=upload.kind, local_dir=directory)
            theirs = _origin(Path(path).read_bytes())
    content = upload.files[ORIGIN]
    assert isinstance(content, bytes)
    mine = _origin(content)
    # A push of an earlier version names the recipe only.
    same = theirs is not None and mine is not None and theirs[0] == mine[0] and theirs[1] in (None, mine[1])
    if same:
        return sorted(name for name in names - upload.files.keys() if PRODUCTS[upload.kind].fullmatch(name))
    if not force:
        raise UserError(
            f"{upload.repository}: this {upload.kind} repository holds something else already; choose another name, or "
            f"add to it with --force"
        )
    return []


def _origin(content: bytes) -> tuple[str, str | None] | None:
    """The recipe's name and the run's time of creation in a `distill.json`; None where it is no such file."""
    try:
        origin = json.loads(content)
    except ValueError:
        return None
    if not isinstance(origin, dict) or not isinstance(name := origin.get("run"), str):
        return None
    created = origin.get("created")
    return name, created if isinstance(created, str) else None


def _send(api: "HfApi", upload: Upload, stale: list[str], private: bool) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    url = api.create_repo(upload.repository, repo_type=upload.kind, private=private or None, exist_ok=True)
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        CommitOperationAdd(name, content if isinstance(content, bytes) else str(content))
        for name, content in upload.files.items()
    ]
    operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
    api.create_commit(upload.repository, operations, commit_message="Upload of a distill run", repo_type=upload.kind)
    return str(url)


@contextmanager
def _reasons(upload: Upload) -> "Iterator[None]":
    """Turn the hub's refusals into UserError and its failures into WorkError; anything else is a bug."""
    try:
        yield
    except Exception as raised:  # of whichever HTTP library is installed
        # The upload of a large file wraps its reason in a RuntimeError.
        wrapped = isinstance(raised, RuntimeError) and isinstance(raised.__cause__, Exception)
        reason = _reason(raised.__cause__ if wrapped and raised.__cause__ else raised, upload)
        if reason is None:
            raise
        raise reason from None


def _reason(error: BaseException, upload: Upload) -> UserError | WorkError | None:
    from huggingface_hub.errors import HfHubHTTPError

    where = f"{upload.kind} {upload.repository}"
    resume = "rerun the same command, which sends only what is missing"
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or f"status {status}"
        if status == 401:
            return UserError(f"{where}: the hub rejected the token; set HF_TOKEN to a valid one")
        if status == 403:
            return UserError(
                f"{where}: the token may not write here ({said}); give it write access, or choose another name"
            )
        if status in (400, 404, 409, 422):
            return UserError(f"{where}: the hub refused it ({said}); check the name, then {resume}")
        return WorkError(f"{where}: the hub failed ({said}); {resume}")
    if names & {"TransportError", "ConnectionError", "Timeout", "HTTPError"}:
        return WorkError(f"{where}: cannot reach the hub ({type(error).__name__}); check the network, then {resume}")
    return None
