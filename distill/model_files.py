"""Model directories: where `weights` points, what is missing there, and the download of a hub id.

Nothing is read but JSON and the headers of files: what the weights are is for the engine to judge. What is refused here
would otherwise be misunderstood later: a Git LFS pointer in place of a file, pickled weights, which are not read, and
the files of an adapter, which transformers would load into the model and the engine would not. A GGUF file stands for
the directory that it is converted to (`distill.gguf_files`).
"""

import json
import re
import struct
from collections.abc import Sequence
from math import prod
from pathlib import Path

from distill import gguf_files
from distill.engine.config import SINGLE, index_of
from distill.errors import UserError

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
ADDRESS = re.compile(r"(https?://|[\w.-]+:\d+(/|$))", re.IGNORECASE)
TOKENIZER_FILES = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model repository
HUB_FILES = (*TOKENIZER_FILES, "*.safetensors")  # what is read here
LFS_POINTER = b"version https://git-lfs"
POINTER_BYTES = 1024  # a pointer is smaller
CODES = {"I32": 8, "U8": 2, "I8": 2}  # of four bits, in an element of a weight
OF_CACHE = (".k_scale", ".v_scale", ".q_scale")  # scales of a quantised cache
BESIDE_CODES = ("weight_scale", "weight_shape", "weight_scale_2", "weight_global_scale", "input_scale", *OF_CACHE)
OF_CODES = ("weight", "weight_packed")
NO_PARAMETERS = (*CODES, "I16", "I64", "F8_E8M0")  # as dtypes of anything but a weight
HEADER_BYTES = 100 << 20  # of a safetensors file; the format's own limit


def find_directory(weights: str, base: Path) -> Path | None:
    """The directory that `weights` names, relative to `base`; None for a hub id that is not also a directory. That of a
    .gguf file is converted first.

    Errors: UserError, the end of a sentence about the setting, for anything else.
    """
    if ADDRESS.match(weights):
        raise UserError(
            f"{weights} is the address of a server; give a directory or a hub id (owner/name); a server can be scored: "
            f"distill eval --model {weights}"
        )
    directory = (base / Path(weights).expanduser()).resolve()
    if directory.is_dir():
        return directory
    if directory.suffix == gguf_files.SUFFIX and directory.is_file():
        return gguf_files.directory_of(directory)
    if directory.is_file():
        raise UserError(
            f"{directory} is a file; give the directory of the model, a .gguf file, or a hub id (owner/name)"
        )
    if HUB_ID.fullmatch(weights) and not weights.endswith(gguf_files.SUFFIX):
        return None
    kind = "file" if weights.endswith(gguf_files.SUFFIX) else "directory"
    raise UserError(f"no {kind} {directory}; give a directory or a hub id (owner/name)")


def first_problem(directory: Path) -> str | None:
    """What keeps a model directory from being used, with the way out; None when its files are all there.

    Errors: UserError for an index of shards that is no JSON.
    """
    if pointer := next((path for path in sorted(directory.iterdir()) if is_pointer(path)), None):
        return f"{pointer} is a Git LFS pointer, not the file: run `git lfs pull` in {directory}"
    shards = sorted(directory.glob("*.safetensors"))
    if not shards and (file := next(iter(sorted(directory.glob("*.gguf"))), None)):
        return f"{directory} holds GGUF files; name one of them in its place, such as {file}"
    if adapter := next(directory.glob("adapter_*"), None):
        return (
            f"{adapter} belongs to an adapter (LoRA), which is not read: merge it into its base (peft: "
            f"merge_and_unload, save_pretrained), or remove the adapter's files"
        )
    if not (directory / "config.json").is_file():
        return f"{directory / 'config.json'} is missing; download it"
    if index_of(directory):
        missing = [path for path in weight_files(directory) if not path.is_file()]
        return f"{missing[0]} is missing; download it ({len(missing)} are missing)" if missing else None
    if not shards and (pickled := next((p for s in ("*.bin", "*.pt", "*.pth") for p in directory.glob(s)), None)):
        return (
            f"{pickled}: pickled weights are not read, because they may run code: convert them to model.safetensors "
            f"(transformers: from_pretrained, save_pretrained)"
        )
    return None if shards else f"{directory / SINGLE} is missing; download it"


def is_pointer(path: Path) -> bool:
    """Whether a file is a Git LFS pointer in place of the file itself."""
    if not path.is_file() or path.stat().st_size >= POINTER_BYTES:
        return False
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def weight_files(directory: Path) -> list[Path]:
    """The files that a model's weights are read from, by the engine, by training and by transformers, whether they are
    there or not. Errors: UserError for an index of shards that is damaged."""
    index = index_of(directory)
    if index is None:
        return [directory / SINGLE]
    map_ = read_object(index).get("weight_map")
    if not isinstance(map_, dict) or not all(isinstance(name, str) for name in map_.values()):
        raise UserError(f"{index}: not a safetensors index (JSON with a weight_map); download it again")
    return [directory / name for name in sorted(set(map_.values()))]


def read_object(file: Path) -> dict[str, object]:
    """The JSON object in a file. Errors: UserError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({' '.join(str(error).split())}); download it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: a JSON {type(content).__name__}, not an object; download it again")
    return content


def shapes(directory: Path) -> dict[str, int] | None:
    """Count the elements of each tensor, from the headers of `weight_files`; None where one cannot be read.

    Codes of four bits share an element: the codes are counted. Scales, shapes and tables of integers are left out.
    Errors: UserError for an index of shards that is damaged.
    """
    sizes: dict[str, int] = {}
    for path in filter(Path.is_file, weight_files(directory)):
        try:
            with path.open("rb") as file:
                (size,) = struct.unpack("<Q", file.read(8))
                header = json.loads(file.read(size)) if size <= HEADER_BYTES else {}
            sizes |= {
                name: prod(tensor["shape"]) * CODES.get(tensor["dtype"], 1)
                for name, tensor in header.items()
                if name != "__metadata__" and not name.endswith(BESIDE_CODES)
                if name.endswith(OF_CODES) or tensor["dtype"] not in NO_PARAMETERS
            }
        except (ValueError, KeyError, TypeError, AttributeError, struct.error):
            return None  # damaged: the engine names it
    return sizes


def parameters(directory: Path) -> int | None:
    """Parameters of the .safetensors files, from their headers; None where a header cannot be read."""
    sizes = shapes(directory)
    return None if sizes is None else sum(sizes.values())


def download(repo: str, revision: str | None, files: Sequence[str] = HUB_FILES) -> Path | str:
    """The directory of a model on the hub, or why it cannot be downloaded, with the way out. files: patterns."""
    from httpx2 import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(files)))
    except GatedRepoError:
        return "accept its licence on the hub and run `hf auth login`"
    except RepositoryNotFoundError:
        return "the hub has no such model, or it is private: check the name, or run `hf auth login`"
    except RevisionNotFoundError:
        return f"the hub has no revision {revision} of it: check `revision`"
    except HFValidationError:
        return "it is not a valid hub id (owner/name)"
    except OfflineModeIsEnabled:
        return "the network is switched off by HF_HUB_OFFLINE: unset it"
    except EntryNotFoundError as error:  # of which the cache's is one: nothing there, and no answer from the hub
        if isinstance(error.__cause__, HfHubHTTPError):
            return _in_one_line(error.__cause__)
        if "offline" in str(error).lower():
            return "the network is switched off by HF_HUB_OFFLINE: unset it"
        return "the Hugging Face Hub cannot be reached: check the network"
    except HTTPError as error:  # another refusal of the hub, or a connection that broke off
        return _in_one_line(error)
    except (ValueError, TypeError, KeyError, AttributeError, AssertionError):
        # parsing the answer of another kind of server
        return "its answer is not that of a model hub: check the network and HF_ENDPOINT"


def _in_one_line(error: Exception) -> str:
    return f"the hub's answer: {' '.join(str(error).split()) or type(error).__name__}"


def model_directory(name: str) -> Path:
    """A model directory, or that of a hub id, downloaded. Errors: UserError when there is none, or it is incomplete."""
    try:
        directory = find_directory(name, Path())
    except UserError as error:
        if name.endswith(gguf_files.SUFFIX):
            raise
        raise UserError(f"{name} is not a model directory, a hub id or an http(s):// address: {error}") from error
    if directory is None:
        place = download(name, None)
        if isinstance(place, str):
            raise UserError(f"{name} is not a directory, and as a hub id it is not on this machine: {place}")
        directory = place
    if problem := first_problem(directory):
        trained = directory / "student"
        if (trained / "config.json").is_file():
            raise UserError(f"{name} is a run directory; its trained model is {trained}")
        raise UserError(f"{problem}: {name} is not a complete model directory")
    return directory
