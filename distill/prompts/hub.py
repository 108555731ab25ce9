"""Prompts from a Hugging Face dataset: an id on the hub, a local dataset directory, or one made by `save_to_disk`.

Not streamed: the download is kept in the ecosystem's cache, so a resumed run needs no network.
"""

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.prompts.files import Row, prompts_from_rows, require_columns, wanted_columns
from distill.prompts.prompt import Prompt

if TYPE_CHECKING:
    from distill.recipe.sources import HubPrompts


def read_hub(source: "HubPrompts") -> Iterator[Prompt]:
    """The prompts of the split, at most `source.limit` rows of it. Errors: UserError when it cannot be had."""
    whole = f"{source.dataset} ({source.split})"
    dataset = load_dataset(source.dataset, source.subset, source.split, source.revision)
    columns = wanted_columns(source)
    require_columns(columns, dataset.column_names, whole)
    path = Path(source.dataset)
    name = path.name if path.is_absolute() else source.dataset  # no home directory in a published data set
    return prompts_from_rows(rows_of_dataset(dataset.select_columns(columns), whole), source, whole, name)


def rows_of_dataset(dataset: Any, whole: str) -> Iterator[Row]:
    """The rows, and where each stands, for messages."""
    for number, row in enumerate(dataset, 1):
        yield f"{whole}, row {number}", row


def load_dataset(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    """A `datasets.Dataset`: of the hub, of a local directory, or made by `save_to_disk`. Errors: UserError."""
    import datasets
    from datasets.exceptions import DatasetsError

    path = Path(name)
    try:
        if (path / "state.json").is_file():
            return datasets.load_from_disk(str(path))
        if (path / "dataset_dict.json").is_file():
            splits = datasets.load_from_disk(str(path))
            if split not in splits:
                raise ValueError(f"no split {split}, only {', '.join(splits)}")
            return splits[split]
        return datasets.load_dataset(name, name=subset, split=split, revision=revision)
    except (DatasetsError, OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(
            f"dataset {name}: {reason}; check its name, subset, split and the network, "
            f"or download it and use `kind: file`"
        ) from error
