"""Rows of a Hugging Face dataset: an id on the hub, a local dataset directory, or one of `save_to_disk`.

Not streamed: the download is kept in the ecosystem's cache, so a resumed run needs no network. Where the hub cannot be
reached, the cache is used at once: `datasets` alone would retry for half a minute first.
"""

import errno
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.prompts.columns import MEDIA, Row, checked

if TYPE_CHECKING:
    from datasets import Dataset

PROBE_SECONDS = 10.0  # for the first answer of the hub


def rows_of_dataset(dataset: "Dataset", whole: str) -> Iterator[Row]:
    """The rows, each with its place for messages. Images, audio and video are not decoded. Errors: UserError."""
    import datasets

    for column, feature in dataset.features.items():
        if column in MEDIA and hasattr(feature, "decode"):
            dataset = dataset.cast_column(column, type(feature)(decode=False))
    try:
        for number, row in enumerate(dataset, 1):
            where = f"{whole}, row {number}"
            yield where, checked(dict(row), where)
    except datasets.exceptions.DatasetsError as error:
        raise UserError(f"{whole}: {' '.join(str(error).split())}; download it again") from error


def load_dataset(name: str, subset: str | None, split: str, revision: str | None) -> "Dataset":
    """A dataset of the hub, of a local directory, or made by `save_to_disk`. Errors: UserError."""
    import datasets

    path = Path(name)
    if path.is_file():
        raise UserError(f"dataset {name}: a file; read it with `kind: file` and `path: {name}`")
    if (path / "state.json").is_file():
        return load_saved(path, None)
    if (path / "dataset_dict.json").is_file():
        return load_saved(path, split)
    with _refused(name), _cache_where_unreachable(name, path.exists()):
        loaded = datasets.load_dataset(name, name=subset, split=split, revision=revision)
    assert isinstance(loaded, datasets.Dataset)
    return loaded


def files_of_dataset(name: str, files: Sequence[str], revision: str | None) -> list[Path]:
    """Files of a dataset's repository on this machine: in a local directory, in the cache, or downloaded.

    Errors: UserError.
    """
    from huggingface_hub import hf_hub_download

    if Path(name).is_dir():
        return [Path(name, file) for file in files]
    with _refused(name):
        return [Path(hf_hub_download(name, file, repo_type="dataset", revision=revision)) for file in files]


def load_saved(path: Path, split: str | None) -> "Dataset":
    """A dataset that `save_to_disk` wrote. split: None takes the only one. Errors: UserError."""
    import datasets

    name = str(path)
    with _refused(name):
        saved = datasets.load_from_disk(name)
    if isinstance(saved, datasets.Dataset):
        if split is not None:
            raise UserError(f"dataset {name}: it has no splits; remove `split: {split}`")
        return saved
    splits = [str(key) for key in saved]
    if split is None and len(splits) == 1:
        (split,) = splits
    if split not in splits:
        what = "it has several splits" if split is None else f"no split {split}"
        raise UserError(f"dataset {name}: {what}; set `split` to one of {', '.join(splits) or '(none)'}")
    return saved[split]


@contextmanager
def _refused(name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # `datasets` passes on whatever its readers raise, StopIteration for an empty file
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(f"dataset {name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    reason = " ".join(str(error.__cause__ or error).split()) or type(error.__cause__ or error).__name__
    if isinstance(error.__cause__ or error, StopIteration):
        reason = "it has no rows"
    if isinstance(error, RuntimeError) and "script" in reason:
        return (
            "it is made by a Python script, which is not run; name its files (`files:`), use its revision "
            "refs/convert/parquet (`revision:`), or download its files and use `kind: file`"
        )
    if isinstance(error, OfflineModeIsEnabled | LocalEntryNotFoundError | ConnectionError):
        return (
            "not on this machine, and the Hugging Face Hub cannot be reached (no network, or HF_HUB_OFFLINE is set); "
            "download it elsewhere and use `kind: file`, or a local directory as `dataset`"
        )
    return f"{reason}; check its name, subset, split and the network, or download it and use `kind: file`"


@contextmanager
def _cache_where_unreachable(name: str, local: bool) -> Iterator[None]:
    """Switch the hub's libraries to their cache while the hub does not answer one request."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    unreachable = False
    if not local and not huggingface_hub.constants.HF_HUB_OFFLINE:
        try:
            huggingface_hub.HfApi().dataset_info(name, timeout=PROBE_SECONDS)
        except (HfHubHTTPError, OfflineModeIsEnabled, ValueError):
            pass  # it answers, or the name is no id: the reason comes from loading
        except Exception as error:  # of whichever HTTP library is installed
            unreachable = isinstance(error, OSError) or "Connect" in type(error).__name__
    if not unreachable:
        yield
        return
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before
