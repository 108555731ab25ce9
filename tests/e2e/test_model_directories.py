"""Damaged model directories: a mutated file is refused in one line, or changes nothing that anybody could notice.

Each mutation is tried in a process, as a user would meet it, with bounds on its memory and its time. What a flipped bit
of the weights' data does to the text cannot be noticed without a record of the file: such a directory is loaded.
"""

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parents[2]
TEACHER = ROOT / "teachers" / "tiny-r1"
MEMORY = 2 << 30  # bytes
SECONDS = 10  # of the processor, for one mutation, in a process that has everything imported
HANGS = 300  # seconds, whatever else this machine does

# One process for many directories: importing torch takes longer than a mutation.
WORKER = f"""
import gc, json, resource, signal, sys, traceback
from pathlib import Path
from distill import backends
from distill.backends import Job, SamplingParams
from distill.errors import UserError
from distill.models import Model
from distill.prompts import Prompt
from distill.recipe import LocalEngine

def late(*_):
    raise TimeoutError("too late")

def answer(directory):
    with backends.open(Model("m", Path(directory)), LocalEngine(device="cpu"), 4) as backend:
        (done,) = backend.complete([job], SamplingParams(temperature=0, max_new_tokens=4), 0)
    return done.text

signal.signal(signal.SIGALRM, late)
signal.signal(signal.SIGPROF, late)
job = Job(Prompt.from_question("What is 2 + 2?", "4"), (0,))
answer({str(TEACHER)!r})
for line in sys.stdin:
    signal.alarm({HANGS})
    signal.setitimer(signal.ITIMER_PROF, {SECONDS})
    try:
        outcome = "text " + repr(answer(line.strip()))
    except UserError as error:
        outcome = "refused " + str(error)
    except BaseException:
        outcome = "failed " + traceback.format_exc()
    signal.alarm(0)
    signal.setitimer(signal.ITIMER_PROF, 0)
    gc.collect()
    status = Path("/proc/self/status").read_text()  # getrusage also counts the process that started this one
    peak = int(status.partition("VmHWM:")[2].split()[0]) << 10
    print(json.dumps([outcome, peak]), flush=True)
"""

VALUES: tuple[object, ...] = (
    None, True, False, 0, -1, 1, 3, 10**6, 2**31, 2**63, 10**40, 0.0, -0.5, 1e-300, 1e300, float("nan"), float("inf"),
    "", "x", "64", "yarn", [], [1], ["x"], [None], {}, {"type": "yarn"}, {"a": {"b": []}}, "x" * 10_000,
)  # fmt: skip


class Directories:
    """Makes mutated copies of the teacher's directory, and tries them in one process after the other."""

    def __init__(self, root: Path) -> None:
        self.root, self.process = root, None

    def outcome(self, directory: Path) -> str:
        """ "text …" or "refused …"; anything else fails the test."""
        if self.process is None:
            command = [sys.executable, "-c", WORKER]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.process.stdin.write(f"{directory}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"{directory}: the process died of signal {-self.process.wait()}"
        outcome, peak = json.loads(line)
        assert not outcome.startswith("failed"), outcome
        assert peak < MEMORY, f"{peak / 2**30:.1f} GiB: {outcome}"
        if outcome.startswith("refused"):
            assert "\n" not in outcome and len(outcome) < 2000 and str(directory) in outcome, outcome
        return str(outcome)

    def mutated(self, seed: int) -> Path:
        """A copy with one mutation."""
        rng, directory = random.Random(seed), self.root / str(seed)
        shutil.copytree(TEACHER, directory)
        weights = directory / "model.safetensors"
        rng.choice((mutate_config, mutate_config, mutate_config, mutate_generation, mutate_header, mutate_bytes,
                    mutate_tensor, mutate_index))(directory, weights, rng)  # fmt: skip
        return directory

    def close(self) -> None:
        if self.process is not None:
            self.process.stdin.close()
            self.process.wait()


def mutate_json(file: Path, rng: random.Random) -> None:
    """Replace or delete a value somewhere, or damage the file's bytes."""
    if rng.random() < 0.2:
        damage(file, rng)
        return
    tree = json.loads(file.read_text())
    inner = tree
    while True:
        key = rng.choice(list(inner))
        if isinstance(inner[key], dict) and inner[key] and rng.random() < 0.7:
            inner = inner[key]
            continue
        break
    if rng.random() < 0.2:
        del inner[key]
    else:
        inner[key] = rng.choice(VALUES)
    file.write_text(json.dumps(tree))


def damage(file: Path, rng: random.Random) -> None:
    """Cut a file off, empty it, or overwrite some of its bytes."""
    content = bytearray(file.read_bytes())
    kind = rng.randrange(3)
    if kind == 0:
        content = content[: rng.randrange(len(content))]
    elif kind == 1:
        pointer = b"version https://git-lfs.github.com/spec/v1\n"
        content = bytearray(rng.choice((b"", b"\0" * 100, pointer, b"[" * 10**5)))
    else:
        for _ in range(rng.randint(1, 5)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    file.write_bytes(content)


def mutate_config(directory: Path, weights: Path, rng: random.Random) -> None:
    mutate_json(directory / "config.json", rng)


def mutate_generation(directory: Path, weights: Path, rng: random.Random) -> None:
    file = directory / "generation_config.json"
    if not file.exists():
        file.write_text(json.dumps({"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True}))
    mutate_json(file, rng)


def mutate_header(directory: Path, weights: Path, rng: random.Random) -> None:
    """The header of the weights: its length, or a byte of its JSON, or a whole entry."""
    content = weights.read_bytes()
    length = int.from_bytes(content[:8], "little")
    kind = rng.randrange(3)
    if kind == 0:
        size = rng.choice((0, 1, length - 1, length + 1, 2**31, 2**63, 2**64 - 1))
        weights.write_bytes(size.to_bytes(8, "little") + content[8:])
        return
    header = content[8 : 8 + length]
    if kind == 1:
        at = rng.randrange(length)
        header = header[:at] + bytes([rng.randrange(32, 127)]) + header[at + 1 :]
    else:
        entries = json.loads(header)
        entry = entries[rng.choice([name for name in entries if name != "__metadata__"])]
        field = rng.choice(("dtype", "shape", "data_offsets"))
        entry[field] = rng.choice((None, [], [0], [2**62, 2], [-1, 4], "F32", "I8", "F64", "x", 7, [[1]]))
        header = json.dumps(entries).encode()
    weights.write_bytes(len(header).to_bytes(8, "little") + header + content[8 + length :])


def mutate_bytes(directory: Path, weights: Path, rng: random.Random) -> None:
    """The weights' file cut off, or other bytes anywhere in it."""
    damage(weights, rng)


def mutate_tensor(directory: Path, weights: Path, rng: random.Random) -> None:
    """One tensor left out, renamed, with another shape, or with a value that is no weight."""
    tensors = load_file(weights)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    kind = rng.randrange(4)
    if kind == 1:
        tensors[name + rng.choice((".x", "_scale_inv", "\u00e9"))] = tensor
    elif kind == 2:
        tensors[name] = tensor.flatten()[: max(1, tensor.numel() // 2)].clone()
    elif kind == 3:
        value = rng.choice((float("nan"), float("inf"), 0.0, -1.0, 1e30))
        tensors[name] = tensor.float().fill_(value).to(tensor.dtype)
    save_file(tensors, weights)


def mutate_index(directory: Path, weights: Path, rng: random.Random) -> None:
    """The weights in two shards, and their index mutated."""
    tensors, map_of = load_file(weights), {}
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, directory / file)
        map_of.update(dict.fromkeys(part, file))
    weights.unlink()
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": map_of}))
    if rng.random() < 0.3:
        name = rng.choice(names)
        outside = ("../model.safetensors", "/etc/passwd", "config.json", "none.safetensors", "", 7, None)
        map_of[name] = rng.choice(outside)
        index.write_text(json.dumps({"metadata": {}, "weight_map": map_of}))
    else:
        mutate_json(index, rng)


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Directories]:
    made = Directories(tmp_path_factory.mktemp("models"))
    yield made
    made.close()


def survive(directories: Directories, seeds: range) -> list[str]:
    outcomes = []
    for seed in seeds:
        directory = directories.mutated(seed)
        outcomes.append(directories.outcome(directory).partition(" ")[0])
        shutil.rmtree(directory)
    return outcomes


def test_the_healthy_directory_is_loaded(directories: Directories) -> None:
    assert directories.outcome(TEACHER).startswith("text")


@pytest.mark.slow
def test_thirty_mutations(directories: Directories) -> None:
    outcomes = survive(directories, range(30))
    assert outcomes.count("refused") >= 15


@pytest.mark.slow
def test_five_hundred_mutations(directories: Directories) -> None:
    outcomes = survive(directories, range(1000, 1500))
    assert outcomes.count("refused") >= 250 and outcomes.count("text") >= 25
