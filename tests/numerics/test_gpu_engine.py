"""The engine through the GPU's ops: against transformers where numbers are plain, against the ops' definition in FP8;
the same with graphs, with streamed experts and with an FP8 cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from four_bit_models import FORMS, build_four_bit
from gpu_checks import slow
from random_models import CONFIGS, build

from distill.engine import Completion, Engine, Request, SamplingParams
from distill.engine.graphs import DecodeGraphs

gpu = pytest.importorskip("distill.engine.kernels.gpu", reason="triton is not installed: pip install triton")
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # junk in slots that nobody fills

QUICK = ("qwen3", "qwen3_5")
TINY_R1 = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*QUICK, *(slow(name) for name in CONFIGS if name not in QUICK)])
def test_float32_is_that_of_transformers(name: str, tmp_path: Path) -> None:
    checkpoint = build(tmp_path, CONFIGS[name])
    engine = Engine.load(checkpoint.path, engine_options(kernels="cuda", cache_tokens=512))
    tokens = some_tokens(60)
    ours = engine_logits(engine, tokens, cuts=(20,), decode_from=55)
    error, what = relative_error(ours.cpu(), checkpoint.logits(tokens))
    assert error < 1e-4, what


@pytest.mark.parametrize(
    ("ue8m0", "cache"), [slow(True, "fp8"), slow(False, "auto"), slow(True, "auto"), slow(False, "fp8")]
)
def test_fp8_is_what_its_definition_says(ue8m0: bool, cache: Any, tmp_path: Path) -> None:
    """On a trained model, whose logits do not hang on single bits as random ones do."""
    path = Path(shutil.copytree(TINY_R1, tmp_path / "model"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] |= {"scale_fmt": "ue8m0"} if ue8m0 else {}
    (path / "config.json").write_text(json.dumps(config))
    tokens = some_tokens(40, config["vocab_size"])
    load = {"dtype": torch.bfloat16, "cache_tokens": 512, "kv_cache_dtype": cache}
    ours, defined = (
        engine_logits(
            Engine.load(path, engine_options(kernels=kernels, **load)), tokens, cuts=(20,), decode_from=36
        ).cpu()
        for kernels in ("cuda", "w8a8")
    )
    plain = engine_logits(Engine.load(path, engine_options(kernels="reference", cache_tokens=512)), tokens)
    far, near = ((one - plain).norm() / plain.norm() for one in (defined, ours))
    print(f"from the unquantised model: defined {far:.3g}, ours {near:.3g}")
    assert near < 1.25 * far < 0.06
    assert (ours - defined).norm() / plain.norm() < 1.5 * far  # two roundings of the same numbers


def completions(engine: Engine, count: int = 3, new: int = 4, **sampling: Any) -> dict[tuple[str, int], Completion]:
    params = SamplingParams(max_new_tokens=new, **sampling)
    requests = [Request(str(i), tuple(some_tokens(9 + 7 * i, seed=i)), params, 0, i, (0, 1)) for i in range(count)]
    return {(done.request_id, done.sample): done for done in engine.generate(requests)}


@pytest.mark.slow
def test_graphs_decode_what_single_steps_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a graph pads with, and another size of batch, leave text and log-probabilities as they are."""
    path, load = build(tmp_path, CONFIGS["v3-yarn"]).path, {"max_context": 100, "max_batch": 6}
    engine = Engine.load(path, engine_options(kernels="cuda", **load))
    sizes: list[int] = []
    assert engine._ahead is not None
    graphs = engine._ahead._graphs
    compute = graphs._compute
    monkeypatch.setattr(graphs, "_compute", lambda size: sizes.append(size) or compute(size))
    alone = Request("alone", tuple(some_tokens(9, seed=9)), SamplingParams(max_new_tokens=4), 0, 9, (0,))
    assert len(list(engine.generate([alone]))) == 1
    ours = completions(engine, temperature=0.7, top_p=0.9, logprobs=2)
    theirs = completions(
        Engine.load(path, engine_options(kernels="reference", **load)), temperature=0.7, top_p=0.9, logprobs=2
    )
    assert {1, 8} <= set(sizes) and len(ours) == 6
    assert ours.keys() == theirs.keys()
    for key, done in ours.items():
        assert done.token_ids == theirs[key].token_ids
        assert done.logprobs == pytest.approx(theirs[key].logprobs, abs=1e-4)
        assert done.top_logprobs is not None and theirs[key].top_logprobs is not None
        for top, expected in zip(done.top_logprobs, theirs[key].top_logprobs, strict=True):
            assert dict(top) == pytest.approx(dict(expected), abs=1e-4)
    assert engine._pages.free_pages == engine._pages.num_pages


@pytest.mark.slow
def test_steps_that_are_launched_ahead_change_nothing(tmp_path: Path) -> None:
    """As in test_engine_ahead.py, with these kernels and, on a GPU, with graphs."""
    path, load = build(tmp_path, CONFIGS["v3"]).path, {"max_context": 60, "max_batch": 3, "page_size": 4}
    engine, reference = (
        Engine.load(path, engine_options(kernels=kernels, **load)) for kernels in ("cuda", "reference")
    )
    ours, theirs = (
        completions(each, count=2, new=6, temperature=0.8, stop_token_ids=tuple(range(0, 500, 7)))
        for each in (engine, reference)
    )
    assert engine._ahead is not None and engine._pages.free_pages == engine._pages.num_pages
    assert {"stop", "length"} == {one.finish_reason for one in ours.values()} and ours.keys() == theirs.keys()
    for key, done in ours.items():
        assert (done.token_ids, done.finish_reason) == (theirs[key].token_ids, theirs[key].finish_reason)
        assert done.logprobs == pytest.approx(theirs[key].logprobs, abs=1e-4)


@pytest.mark.slow
def test_where_experts_lie_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build(tmp_path, CONFIGS["v3"], fp8=True).path
    monkeypatch.setattr(
        DecodeGraphs, "serve", lambda self, rows, longest: False
    )  # a padded batch may take another tile
    load = {"kernels": "cuda", "dtype": torch.bfloat16, "max_context": 100, "max_batch": 6}
    whole = completions(Engine.load(path, engine_options(**load)), count=1, new=3)
    for limit in ({"resident_experts": 0}, {"resident_experts": 9}, {"memory_budget": 1 << 30}):
        streamed = completions(Engine.load(path, engine_options(**limit, **load)), count=1, new=3)
        assert {k: (d.token_ids, d.logprobs) for k, d in streamed.items()} == {
            k: (d.token_ids, d.logprobs) for k, d in whole.items()
        }


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v32", "glm-shared", "v4", "qwen3_5", "gemma4", "smollm3"])
def test_generates_what_the_reference_does(name: str, tmp_path: Path) -> None:
    """With graphs where the family has them, and without: sparse attention decodes without a graph."""
    path = build(tmp_path, CONFIGS[name]).path
    load = {"dtype": torch.float32, "max_context": 100, "max_batch": 6}
    engine = Engine.load(path, engine_options(kernels="cuda", **load))
    ours = completions(engine, count=3, new=5)
    reference = completions(Engine.load(path, engine_options(kernels="reference", **load)), count=3, new=5)
    assert {k: d.token_ids for k, d in ours.items()} == {k: d.token_ids for k, d in reference.items()}
    assert engine._pages.free_pages == engine._pages.num_pages


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_experts_of_four_bits(form: str, tmp_path: Path) -> None:
    config = {**CONFIGS["kimi-k2"], "hidden_size": 64, "moe_intermediate_size": 32}
    checkpoint = build_four_bit(tmp_path, config, form)
    engine = Engine.load(tmp_path, engine_options(kernels="cuda", cache_tokens=512))
    tokens = some_tokens(40)
    ours = engine_logits(engine, tokens, cuts=(20,), decode_from=35)
    error, what = relative_error(ours.cpu(), checkpoint.logits(tokens))
    assert error < 1e-4, what


def test_experts_of_all_layers_have_to_fit_into_the_hosts_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build(tmp_path, CONFIGS["v3"]).path
    monkeypatch.setattr("os.sysconf", lambda name: {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 4096}[name])
    options = {"kernels": "cuda", "dtype": torch.bfloat16, "cache_tokens": 512}
    Engine.load(path, engine_options(resident_experts=16, **options))
    each = 2 * (2 * 128 * 128 + 64 * 128)  # bytes: gate and up, down; what is summed over is padded to 128
    size = 2 * 7 * each / 2**30
    with pytest.raises(ValueError, match=rf"{size:.3g} GiB of experts do not fit on the GPU and not into .* server"):
        Engine.load(path, engine_options(resident_experts=9, **options))


def test_an_fp8_cache_is_refused_where_it_cannot_be(tmp_path: Path) -> None:
    path = build(tmp_path, CONFIGS["v3"]).path
    for options, message in (
        ({"kernels": "reference"}, "takes a GPU"),
        ({"kernels": "cuda"}, "bfloat16"),
        ({"kernels": "cuda", "dtype": torch.bfloat16}, "blocks of 128"),
    ):
        with pytest.raises(ValueError, match=message):
            Engine.load(path, engine_options(kv_cache_dtype="fp8", **options))
