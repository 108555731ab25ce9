"""Models larger than memory: where an expert lies changes no bit, and a budget is kept."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_checks import engine_logits, engine_options, some_tokens
from hypothesis import given
from hypothesis import strategies as st
from random_models import V3, V3_YARN, V32, Checkpoint, build, dequantise, write
from safetensors.torch import load_file

from distill.engine import Engine, Request, SamplingParams
from distill.engine.families import spec_of
from distill.engine.kernels import cpu
from distill.engine.offload import ExpertStream, resident_experts, step_bytes

TINY_R1 = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"
GetCheckpoint = Callable[[str], Checkpoint]
SIXTEEN_EXPERTS_OF_TWO_LAYERS = "v3-drafts"


@pytest.fixture(params=["reference", "cpu"])
def kernels(request: pytest.FixtureRequest) -> str:
    if request.param == "cpu" and (why := cpu.why_missing()):
        pytest.skip(f"no compiled kernels: {why}")
    return str(request.param)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four layers with experts, FP8, in shards."""
    config = {**V3_YARN, "num_hidden_layers": 5, "hidden_size": 160, "moe_intermediate_size": 136}
    return build(tmp_path_factory.mktemp("fp8"), config, fp8=True, shards=3).path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_same_bits_wherever_experts_lie(fp8: Path, kernels: str, dtype: torch.dtype) -> None:
    """None resident, half, all but one, all; many tokens (whole layers, read ahead) and few (the chosen experts)."""
    tokens = some_tokens(60)

    def logits(resident: int | None) -> torch.Tensor:
        engine = Engine.load(
            fp8, engine_options(dtype=dtype, cache_tokens=512, kernels=kernels, resident_experts=resident)
        )
        assert (engine._model.stream is not None) == (resident is not None and resident < 16)
        parts = [
            engine_logits(engine, tokens, cuts=(3, 40)),
            engine_logits(engine, tokens, decode_from=50),
            engine_logits(engine, tokens[:2]),
        ]
        return torch.cat(parts)

    expected = logits(None)
    for resident in (0, 8, 15, 16):
        assert torch.equal(logits(resident), expected), f"{resident} resident"


def rewritten(published: Path, path: Path, dtype_of: Callable[[str], torch.dtype | None]) -> Path:
    """The model with some matrices in another dtype than FP8. dtype_of: by name; None for FP8."""
    tensors = {k: v for shard in sorted(published.glob("*.safetensors")) for k, v in load_file(shard).items()}
    for name in [name for name in tensors if ".experts." in name and name.endswith(".weight")]:
        if dtype := dtype_of(name):
            tensors[name] = dequantise(tensors[name], tensors.pop(name + "_scale_inv")).to(dtype)
    (path / "config.json").write_text((published / "config.json").read_text())
    write(path, tensors)
    return path


def test_layers_whose_experts_differ_in_size(fp8: Path, kernels: str, tmp_path: Path) -> None:
    """The first layer with experts has them in FP8, the others in bfloat16, which takes twice the memory."""
    path = rewritten(fp8, tmp_path, lambda name: None if ".layers.1." in name else torch.bfloat16)

    def logits(resident: int | None) -> torch.Tensor:
        options = engine_options(torch.bfloat16, cache_tokens=512, kernels=kernels, resident_experts=resident)
        return engine_logits(Engine.load(path, options), some_tokens(20), decode_from=18)

    expected = logits(None)
    assert torch.equal(logits(0), expected) and torch.equal(logits(8), expected)


@pytest.mark.parametrize(
    ("dtype_of", "named"),
    [
        (lambda name: torch.bfloat16 if ".experts.0." in name else None, "experts.1.gate_proj.weight"),
        (lambda name: torch.bfloat16 if ".experts.3.up" in name else None, "experts.3.up_proj.weight"),
        (lambda name: torch.float32 if ".experts.3." in name else torch.bfloat16, "experts.3.gate_proj.weight"),
        (lambda name: torch.float32 if "down_proj" in name else torch.bfloat16, "experts.0.down_proj.weight"),
    ],
)
def test_experts_of_a_layer_in_two_forms_are_refused(
    dtype_of: Callable[[str], torch.dtype | None], named: str, fp8: Path, kernels: str, tmp_path: Path
) -> None:
    path = rewritten(fp8, tmp_path, dtype_of)
    with pytest.raises(ValueError, match=f"tensor model.layers.1.mlp.{named} is stored in another form") as caught:
        Engine.load(path, engine_options(cache_tokens=64, kernels=kernels))
    assert "\n" not in str(caught.value)


def test_text_is_the_same_wherever_experts_lie(kernels: str, checkpoint: GetCheckpoint) -> None:
    """Batches that grow and shrink, with drafts, so that the reading ahead begins and stops."""
    path = checkpoint(SIXTEEN_EXPERTS_OF_TWO_LAYERS).path
    requests = [
        Request(str(n), tuple(some_tokens(3 + n, seed=n)), SamplingParams(max_new_tokens=3 + 4 * n), 1, n, (0, 1))
        for n in range(8)
    ]

    def texts(**options: int) -> dict[tuple[str, int], tuple[int, ...]]:
        engine = Engine.load(
            path, engine_options(kernels=kernels, cache_tokens=1024, num_speculative_tokens=1, **options)
        )
        return {(c.request_id, c.sample): c.token_ids for c in engine.generate(requests)}

    assert texts(resident_experts=0) == texts(resident_experts=5) == texts()


@given(
    count=st.integers(2, 300),
    sizes=st.integers(1, 10**8).flatmap(lambda most: st.lists(st.sampled_from((most, -(-most // 2))), min_size=1)),
    budget=st.integers(0, 10**13),
)
def test_as_many_experts_as_fit(count: int, sizes: list[int], budget: int) -> None:
    """Layers of one size or two: both arenas hold the experts of the largest."""
    banks = [SimpleNamespace(count=count, bytes_each=each) for each in sizes]

    def used(resident: int) -> int:
        return resident * sum(sizes) + (2 * (count - resident) * max(sizes) if resident < count else 0)

    try:
        resident = resident_experts(budget, banks)
    except ValueError as error:
        assert "raise memory_budget" in str(error)
        assert budget < used(0) or sum(sizes) <= 2 * max(sizes)
        assert budget < used(count)
        return
    if resident is None:
        assert used(count) <= budget
    else:
        assert used(resident) <= budget < used(count)
        assert resident + 1 >= count or budget < used(resident + 1)


def test_budgets_that_are_too_small(fp8: Path) -> None:
    with pytest.raises(
        ValueError, match=r"memory_budget is 0\.\d+ GiB and 0\.\d+ GiB are needed for weights, cache and one step"
    ):
        Engine.load(fp8, engine_options(device="cpu", cache_tokens=64, memory_budget=1 << 20))
    with pytest.raises(ValueError, match="resident_experts is 17; there are 16"):
        Engine.load(fp8, engine_options(device="cpu", cache_tokens=64, resident_experts=17))


def test_the_context_that_a_prompt_attends_to_counts(tmp_path: Path, kernels: str) -> None:
    """A head's keys and values of a million tokens in float32 are 64 numbers each (40 of a key, 24 of a value or of a
    key's part), 256 MiB; a thread of the kernels has one head's, the reference those of all four."""
    path, heads = build(tmp_path, {**V3, "max_position_embeddings": 1 << 20}).path, 1 if kernels == "cpu" else 4

    def load(mebibytes: int, context: int) -> Engine:
        options = {"cache_tokens": 64, "max_context": context, "memory_budget": mebibytes << 20}
        return Engine.load(path, engine_options(device="cpu", kernels=kernels, **options))

    load(64, 4096)
    with pytest.raises(ValueError, match="are needed for weights, cache and one step"):
        load(256 * heads, 1 << 20)
    load(256 * heads + 64, 1 << 20)


def test_attention_to_chosen_tokens_writes_out_no_more_than_these() -> None:
    dense, sparse = (
        [step_bytes(spec, 64, 4, torch.bfloat16, context, 4) for context in (512, 1 << 20)]
        for spec in (spec_of(V3), spec_of({**V32, "index_topk": 512}))
    )
    assert dense[1] - dense[0] == 4 * ((1 << 20) - 512) * 64 * 2 and sparse[0] == sparse[1]


def test_damage_is_found_in_experts_that_are_not_resident(fp8: Path, tmp_path: Path, kernels: str) -> None:
    name = "model.layers.4.mlp.experts.15.down_proj.weight"
    tensors = {k: v for shard in sorted(fp8.glob("*.safetensors")) for k, v in load_file(shard).items()}
    (tmp_path / "config.json").write_text((fp8 / "config.json").read_text())
    tensors[name].view(torch.uint8)[3, 4] = 0xFF
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"tensor {name} holds FP8 NaN codes"):
        Engine.load(tmp_path, engine_options(cache_tokens=64, kernels=kernels, resident_experts=0))
    tensors[name].view(torch.uint8)[3, 4] = 0
    tensors[name + "_scale_inv"][0, 1] = float("inf")
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=f"tensor {name}_scale_inv is not finite"):
        Engine.load(tmp_path, engine_options(cache_tokens=64, kernels=kernels, resident_experts=0))


def test_experts_that_would_have_to_be_converted_are_not_streamed(checkpoint: GetCheckpoint) -> None:
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    with pytest.raises(ValueError, match=r"stored as FP8 or torch\.bfloat16 cannot be streamed; raise the memory"):
        Engine.load(
            checkpoint("v3").path,
            engine_options(dtype=torch.bfloat16, cache_tokens=64, kernels="cpu", resident_experts=3),
        )


def test_what_failed_in_the_background_is_not_lost() -> None:
    class Bank:
        count, resident, bytes_each, queued = 4, 0, 1, False

        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def fill(self, arena: object, chosen: object, background: bool = False) -> None:
            if self.error:
                raise self.error

        def install(self, arena: object) -> None:
            pass

    banks = [Bank(None), Bank(OSError("disk gone"))]
    stream = ExpertStream(banks, SimpleNamespace(arena=bytearray))  # type: ignore[arg-type]
    chosen = torch.arange(4)[None]
    stream.bring(banks[0], chosen)
    with pytest.raises(OSError, match="disk gone"):
        stream.bring(banks[1], chosen)


PEAK = """
import json, re, sys
from pathlib import Path
import torch
from distill.engine import Engine, EngineOptions, Request, SamplingParams
path, budget = sys.argv[1], int(sys.argv[2])
def run(path, budget):
    options = EngineOptions(
        device="cpu", dtype="bfloat16", max_batch=16, max_step_tokens=256, memory_budget=budget or None
    )
    engine = Engine.load(path, options)
    sampling = SamplingParams(temperature=0, max_new_tokens=4)
    requests = [Request(str(n), tuple(range(1, 60 + n)), sampling, 0, n, (0,)) for n in range(16)]
    return engine, sorted((c.request_id, c.token_ids) for c in engine.generate(requests))
run(sys.argv[3], 0)  # whatever is loaded and set up on first use
Path("/proc/self/clear_refs").write_text("5")  # the peak so far is that of the process this one was forked from
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10
before = peak()
engine, texts = run(path, budget)
print(json.dumps({
    "peak": peak() - before,
    "resident": engine._model.stream and engine._model.weights.layers[-1].mlp.experts.resident,
    "texts": texts,
}))
"""


@pytest.mark.slow
def test_peak_memory_stays_under_the_budget(tmp_path: Path) -> None:
    """A checkpoint of 120 MB under a budget of half of it: the peak beyond the process's baseline, all included."""
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    if sys.platform != "linux":
        pytest.skip("pages of mapped files are given back on Linux only")
    config = {
        **V3_YARN, "num_hidden_layers": 10, "hidden_size": 512, "moe_intermediate_size": 256, "n_routed_experts": 32,
        "max_position_embeddings": 128,
    }  # fmt: skip
    path = build(tmp_path, config, fp8=True, shards=4).path
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))

    def measured(budget: int) -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, "-c", PEAK, str(path), str(budget), str(TINY_R1)],
            capture_output=True,
            text=True,
            check=True,
        )
        return json.loads(done.stdout)

    whole, half = measured(0), measured(size // 2)
    assert whole["resident"] is None and half["resident"] and 0 < half["resident"] < 32
    assert whole["peak"] > size * 0.9, "the measurement is meant to see the weights"
    assert half["peak"] < size // 2, f"{half['peak'] / 1e6:.0f} MB of {size / 2e6:.0f}"
    assert half["texts"] == whole["texts"]
