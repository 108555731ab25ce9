"""An engine whose weights were replaced in place is the engine that is loaded from a directory with these weights."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checks import engine_options, some_tokens
from random_models import CONFIGS, Checkpoint, build, write
from torch import Tensor

from distill.engine import Completion, Engine, Engines, Request, SamplingParams
from distill.engine.kernels import cpu, pages
from distill.engine.kernels.ops import Packed

MODELS = (
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "qwen3-mha-tied",
    "llama-mqa-biases",
    "llama-mha-tied",
    "gemma4",
    "gemma4-large",
)
FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
SCORED = [some_tokens(40, seed=9), some_tokens(7, seed=8)]

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter: junk in slots that nobody fills


@pytest.fixture(params=["cpu", "reference", "w8a8", pytest.param("cuda", marks=pytest.mark.slow)])  # Triton interpreted
def kernels(request: pytest.FixtureRequest) -> str:
    column: str = request.param
    if column == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    if column == "cuda" and find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install triton")
    return column


def checkpoint(path: Path, name: str, stored: torch.dtype, seed: int) -> Checkpoint:
    built = build(path, CONFIGS[name], seed=seed)
    built.tensors = {name: tensor.detach().to(stored) for name, tensor in built.tensors.items()}
    write(path, built.tensors)
    return built


class Asked(dict[str, Tensor]):
    """Tensors by name, and the names that were asked for, in order."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__(tensors)
        self.names: list[str] = []

    def __getitem__(self, name: str) -> Tensor:
        self.names.append(name)
        return super().__getitem__(name)


def load(path: Path, kernels: str, dtype: torch.dtype, **options: Any) -> Engine:
    return Engine.load(path, engine_options(dtype, kernels=kernels, cache_tokens=1024, max_batch=4, **options))


def requests(length: int) -> list[Request]:
    """Greedy and sampled, of prompts that share their first tokens."""
    sampling = SamplingParams(temperature=0.9, top_p=0.95, max_new_tokens=length, stop_token_ids=(7,), logprobs=3)
    prompt = tuple(some_tokens(20))
    return [
        Request("greedy", prompt, replace(sampling, temperature=0.0), 1, 5, (0,)),
        Request("drawn", (*prompt[:17], 4), sampling, 1, 6, (0, 1)),
    ]


def scores(engine: Engine) -> list[object]:
    return [(score.logprobs, score.top_logprobs) for score in engine.score(SCORED, top_k=4)]


def everything(engine: Engine, length: int) -> tuple[dict[tuple[str, int], Completion], object]:
    """Texts, log-probabilities and scores."""
    done = {(c.request_id, c.sample): c for c in engine.generate(requests(length))}
    return done, scores(engine)


def places(engine: Engine) -> list[int]:
    """Where the numbers are in memory."""

    def address(matrix: Packed) -> int:
        return matrix.data_ptr() if isinstance(matrix, Tensor) else matrix.struct.data  # type: ignore[attr-defined]  # the CPU column's

    held = engine._model.weights.held.values()
    return [place for each in held for place in (*map(address, each.matrices), *(t.data_ptr() for t in each.tensors))]


@pytest.mark.one_in(7)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_is_the_engine_loaded_from_these_weights(name: str, dtype: torch.dtype, kernels: str, tmp_path: Path) -> None:
    """Twice in a row, in the place of the old ones."""
    length, updates = (1, 1) if kernels == "cuda" else (12, 2)  # the interpreter takes seconds a step
    made = [checkpoint(tmp_path / str(seed), name, dtype, seed) for seed in range(1 + updates)]
    engine = load(made[0].path, kernels, dtype)
    before = everything(engine, length), places(engine)
    for other in made[1:]:
        asked = Asked(other.tensors)
        engine.update(asked.__getitem__)
        fresh = load(other.path, kernels, dtype)
        got = everything(engine, length)
        assert got == everything(fresh, length)
        assert got != before[0], "the weights are others, and so is what they say"
        assert places(engine) == before[1]
        assert sorted(asked.names) == sorted(other.tensors), "each name once"
        assert engine.numerics == fresh.numerics


@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("name", ["qwen2-tied", "qwen3", "llama-mqa-biases"])
def test_the_gpu_column_holds_what_loading_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Bit for bit, without running its kernels, which takes long under Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: pip install triton")
    engine = load(checkpoint(tmp_path / "old", name, BFLOAT16, 0).path, "cuda", dtype)
    other = checkpoint(tmp_path / "new", name, FLOAT32, 1)
    before = places(engine)
    engine.update(other.tensors.__getitem__)
    fresh = load(other.path, "cuda", dtype)._model.weights.held
    assert places(engine) == before
    for name, held in engine._model.weights.held.items():
        ours, theirs = ([*each.matrices, *each.tensors] for each in (held, fresh[name]))
        for one, two in zip(ours, theirs, strict=True):
            assert isinstance(one, Tensor) and isinstance(two, Tensor) and one.dtype == two.dtype
            assert torch.equal(one, two)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("given", [FLOAT32, BFLOAT16, torch.float16], ids=str)
@pytest.mark.parametrize("stored", [FLOAT32, BFLOAT16], ids=str)
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_tensors_of_any_dtype_and_layout(
    dtype: torch.dtype, stored: torch.dtype, given: torch.dtype, kernels: str, tmp_path: Path
) -> None:
    """An update keeps every bit that loading keeps, in particular from a float32 trainer of a bfloat16 student.
    Parameters that require gradients, and transposed ones, are accepted."""
    engine = load(checkpoint(tmp_path / "old", "qwen2-tied", stored, 0).path, kernels, dtype)
    other = checkpoint(tmp_path / "new", "qwen2-tied", given, 1)
    parameters = {
        name: torch.nn.Parameter(tensor.T.contiguous().T if tensor.ndim == 2 else tensor)
        for name, tensor in other.tensors.items()
    }
    engine.update(parameters.__getitem__)
    fresh = load(other.path, kernels, dtype)
    assert scores(engine) == scores(fresh)
    assert engine.numerics == fresh.numerics


@pytest.fixture
def engine_and_tensors(tmp_path: Path) -> Iterator[tuple[Engine, dict[str, Tensor]]]:
    made = checkpoint(tmp_path, "qwen2", FLOAT32, 0)
    yield Engine.load(made.path, engine_options(cache_tokens=1024)), made.tensors


def test_refused_while_requests_are_queued(engine_and_tensors: tuple[Engine, dict[str, Tensor]]) -> None:
    engine, tensors = engine_and_tensors
    expected = everything(engine, 12)
    engine.add(replace(requests(12)[0], id="queued"))
    with pytest.raises(ValueError, match="1 requests are queued"):
        engine.update(tensors.__getitem__)
    engine.step()
    with pytest.raises(ValueError, match="1 requests are queued"):
        engine.update(tensors.__getitem__)
    engine.abort("queued")
    engine.update(tensors.__getitem__)
    assert everything(engine, 12) == expected


@pytest.mark.one_in(5)
@pytest.mark.parametrize("name", ["qwen2-tied", "llama-mqa-biases"])
@pytest.mark.parametrize("dtype", [FLOAT32, BFLOAT16], ids=str)
def test_released_memory_is_used_again_after_an_update(
    name: str, dtype: torch.dtype, kernels: str, tmp_path: Path
) -> None:
    if kernels == "cuda":
        pytest.skip("memory of a GPU stays")
    made, other = (checkpoint(tmp_path / str(seed), name, dtype, seed) for seed in range(2))
    engine, fresh = load(made.path, kernels, dtype), load(other.path, kernels, dtype)
    everything(engine, 12)
    before = places(engine)
    engine.release()
    for _ in range(2):
        with pytest.raises(ValueError, match="weights were released; update them"):
            engine.score(SCORED)
        with pytest.raises(ValueError, match="weights were released; update them"):
            engine.add(requests(12)[0])
        engine.release()
    engine.update(other.tensors.__getitem__)
    assert everything(engine, 12) == everything(fresh, 12) and places(engine) == before


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_pages_are_taken_when_written_and_given_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    size, before = 64 << 20, resident()
    numbers = pages.zeros(size).view(torch.int32).view(4, -1)
    assert not numbers[1, :1000].any() and resident() - before < size // 8
    numbers.fill_(7)
    assert resident() - before > size * 7 // 8
    pages.discard(numbers.data_ptr(), size)
    assert resident() - before < size // 8 and not numbers.any()


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux only")
def test_what_shares_a_page_stays() -> None:
    numbers = torch.ones(1 << 16)
    begin = numbers.data_ptr() + 4
    pages.discard(begin, numbers.nbytes - 8)
    zeros = int((numbers == 0).sum())
    assert (1 << 16) - 2048 <= zeros < 1 << 16, "whole pages only"
    assert numbers[0] == 1 and numbers[-1] == 1


def test_released_while_requests_are_queued(engine_and_tensors: tuple[Engine, dict[str, Tensor]]) -> None:
    engine, _ = engine_and_tensors
    engine.add(requests(12)[0])
    with pytest.raises(ValueError, match="updated or released while 1 requests are queued"):
        engine.release()
    engine.step()


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("damage", ["shape", "nan", "infinity", "dtype", "missing"])
def test_a_bad_tensor_is_named_and_nothing_is_served(
    name: str, damage: str, engine_and_tensors: tuple[Engine, dict[str, Tensor]]
) -> None:
    """… until an update succeeds."""
    engine, tensors = engine_and_tensors
    expected, bad = everything(engine, 12), dict(tensors)
    if damage == "shape":
        bad[name] = tensors[name][:-1]
    elif damage == "dtype":
        bad[name] = tensors[name].to(torch.float64)
    elif damage == "missing":
        del bad[name]
    else:
        bad[name] = tensors[name].clone()
        bad[name].view(-1)[-1] = torch.tensor(float("nan" if damage == "nan" else "-inf"))
    if damage == "missing":
        with pytest.raises(KeyError, match=name):
            engine.update(bad.__getitem__)
    else:
        with pytest.raises(ValueError, match=f"^tensor {name} ") as raised:
            engine.update(bad.__getitem__)
        assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="failed half-way"):
        engine.score(SCORED)
    with pytest.raises(ValueError, match="failed half-way"):
        engine.add(requests(12)[0])
    engine.update(tensors.__getitem__)
    assert everything(engine, 12) == expected


def test_numbers_too_large_for_the_compute_dtype_are_not_finite(kernels: str, tmp_path: Path) -> None:
    """The largest float32 rounds to infinity in bfloat16."""
    made = checkpoint(tmp_path, "qwen3", FLOAT32, 0)
    engine = load(made.path, kernels, BFLOAT16)
    made.tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = torch.finfo(FLOAT32).max
    with pytest.raises(ValueError, match=r"^tensor model.layers.0.self_attn.v_proj.weight holds numbers that are not"):
        engine.update(made.tensors.__getitem__)


@pytest.mark.parametrize(("name", "fp8", "words"), [("v3", True, "deepseek_v3"), ("qwen2", True, "FP8")])
def test_models_that_are_no_students_are_refused(name: str, fp8: bool, words: str, tmp_path: Path) -> None:
    made = build(tmp_path, CONFIGS[name], fp8=fp8)
    engine = Engine.load(made.path, engine_options(cache_tokens=512))
    expected = scores(engine)
    with pytest.raises(ValueError, match=words):
        engine.update(made.tensors.__getitem__)
    assert scores(engine) == expected


def test_several_engines_refuse(tmp_path: Path) -> None:
    made = checkpoint(tmp_path, "qwen2", FLOAT32, 0)
    engines = Engines.load(made.path, ["cpu"], engine_options(cache_tokens=512))
    with engines, pytest.raises(ValueError, match="data_parallel_size: 1"):
        engines.update(made.tensors.__getitem__)
