"""Models with weights in four bits, under the names of each publisher: parity with transformers on the decoded
weights, the same bits wherever experts are, alone and in a batch, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from four_bit_models import COMPRESSED, FORMS, build_four_bit
from random_models import KIMI_K2, Checkpoint, write
from safetensors.torch import load_file

from distill.engine import Engine, Request, SamplingParams
from distill.engine.families import spec_of
from distill.engine.kernels import cpu
from distill.model_files import shapes

SIZES = {"hidden_size": 64, "moe_intermediate_size": 32, "n_routed_experts": 8, "num_experts_per_tok": 2}
CONFIG: dict[str, Any] = {**KIMI_K2, **SIZES, "num_hidden_layers": 4}
NAMES = {
    "int4": "int4 group 32",
    "mxfp4": "mxfp4 group 32",
    "mxfp4-packed": "mxfp4 group 32",
    "nvfp4": "nvfp4 group 16",
    "nvfp4-packed": "nvfp4 group 16",
}


@pytest.fixture(scope="module", params=FORMS)
def four_bit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Checkpoint]:
    return request.param, build_four_bit(tmp_path_factory.mktemp(request.param), CONFIG, request.param)


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return build_four_bit(tmp_path_factory.mktemp("int4"), CONFIG)


def load(path: Path, dtype: torch.dtype = torch.float32, **values: Any) -> Engine:
    return Engine.load(path, engine_options(dtype=dtype, cache_tokens=2048, device="cpu", **values))


def test_parity(four_bit: tuple[str, Checkpoint]) -> None:
    form, checkpoint = four_bit
    tokens = some_tokens(40)
    engine = load(checkpoint.path)
    assert engine._model.weights.stored == NAMES[form]
    theirs = checkpoint.logits(tokens)
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    for ours in (engine_logits(engine, tokens, cuts=(7, 30)), engine_logits(engine, tokens, decode_from=20)):
        error, report = relative_error(ours, theirs)
        assert error <= 1e-4, report


def test_matrices_beside_the_experts_may_have_four_bits_too(tmp_path: Path) -> None:
    config = {**CONFIG, "num_hidden_layers": 2, "kv_lora_rank": 64, "q_lora_rank": 64, "v_head_dim": 16}
    checkpoint = build_four_bit(tmp_path, config, "nvfp4", experts_only=False)
    tokens = some_tokens(30)
    error, report = relative_error(engine_logits(load(tmp_path), tokens), checkpoint.logits(tokens))
    assert error <= 1e-4, report


@pytest.mark.one_in(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_are_the_same_wherever_experts_are(four_bit: tuple[str, Checkpoint], dtype: torch.dtype) -> None:
    """In memory for good, streamed; whole layers, read ahead, or the chosen experts alone."""
    path, tokens = four_bit[1].path, some_tokens(24)

    def logits(resident: int | None) -> torch.Tensor:
        engine = load(path, dtype, resident_experts=resident)
        assert (engine._model.stream is not None) == (resident is not None)
        return torch.cat((engine_logits(engine, tokens, cuts=(3,), decode_from=16), engine_logits(engine, tokens[:2])))

    expected = logits(None)
    for resident in (0, 5):
        assert torch.equal(logits(resident), expected), f"{resident} resident"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alone_as_in_a_batch_of_64(int4: Checkpoint, dtype: torch.dtype) -> None:
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    engine = load(int4.path, dtype, max_batch=64, max_step_tokens=48)
    requests = [
        Request(str(n), tuple(some_tokens(2 + n % 7, seed=n)), SamplingParams(max_new_tokens=4), 1, n, (0,))
        for n in range(64)
    ]

    def outcome(some: list[Request]) -> dict[str, tuple[Any, ...]]:
        return {done.request_id: (done.token_ids, done.logprobs) for done in engine.generate(some)}

    together = outcome(requests)
    for request in requests[:64:9]:
        assert outcome([request]) == {request.id: together[request.id]}


def test_memory_is_that_of_the_published_experts(int4: Checkpoint) -> None:
    if why := cpu.why_missing():
        pytest.skip(f"no compiled kernels: {why}")
    engine, held = load(int4.path), load_file(int4.path / "model.safetensors")
    banks = [layer.mlp.experts for layer in engine._model.weights.layers[1:]]
    published = sum(t.nbytes for name, t in held.items() if ".experts." in name and not name.endswith("_shape"))
    assert sum(bank.count * bank.bytes_each for bank in banks) == published
    kept = load(int4.path, resident_experts=3)._model.weights.layers[1].mlp.experts._memory.size
    assert kept == 3 * banks[0].bytes_each, "those that are streamed take memory"
    counted, real = shapes(int4.path), {name: tensor.numel() for name, tensor in int4.tensors.items()}
    assert counted is not None and sum(counted.values()) == sum(real.values()), "parameters, not elements"


def break_experts(name: str, tensors: dict[str, torch.Tensor]) -> None:
    at = "model.layers.2.mlp.experts.3.up_proj.weight"
    if name == "a scale that is not finite":
        tensors[at + "_scale"][1, 0] = float("nan")
    elif name == "another shape":
        tensors[at + "_shape"] = torch.tensor([64, 64])
    elif name == "no scale":
        del tensors[at + "_scale"]
    elif name == "zero points":
        tensors[at + "_zero_point"] = torch.zeros(4, 2, dtype=torch.int32)
    elif name == "groups that are none":
        tensors[at + "_scale"] = torch.ones(32, 3).bfloat16()
    elif name == "one expert in bfloat16":
        for ending in ("_packed", "_scale", "_shape"):
            del tensors[at + ending]
        tensors[at] = torch.zeros(32, 64).bfloat16()
    elif name == "one expert with wider scales":
        tensors[at + "_scale"] = tensors[at + "_scale"].float()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a scale that is not finite", r"experts\.3\.up_proj\.weight_scale is not finite"),
        ("another shape", r"weight_shape holds \[64, 64\], config.json makes it \[32, 64\]"),
        ("no scale", r"experts\.3\.up_proj\.weight_scale is missing"),
        ("zero points", r"weight_zero_point has no place in the model"),
        ("groups that are none", r"weight_scale has shape \[32, 3\], which cannot be the groups of 64 columns"),
        ("one expert in bfloat16", r"experts\.3\.up_proj\.weight is stored in another form than the other experts"),
        ("one expert with wider scales", r"experts\.3\.up_proj\.weight is stored in another form than the other"),
    ],
)
def test_damaged_and_mixed_experts_are_named(what: str, message: str, int4: Checkpoint, tmp_path: Path) -> None:
    tensors = load_file(int4.path / "model.safetensors")
    break_experts(what, tensors)
    (tmp_path / "config.json").write_text((int4.path / "config.json").read_text())
    write(tmp_path, tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load(tmp_path, resident_experts=0)
    assert "\n" not in str(caught.value)


def changed(key: str, value: Any) -> dict[str, Any]:
    quantised: dict[str, Any] = json.loads(json.dumps(COMPRESSED))
    weights = quantised["config_groups"]["group_0"]["weights"]
    (weights if key in weights else quantised)[key] = value
    return quantised


@pytest.mark.parametrize(
    ("quantised", "message"),
    [
        (changed("symmetric", False), "'symmetric' is False; only True is supported"),
        (changed("num_bits", 8), "'num_bits' is 8; only 4"),
        (changed("strategy", "block"), "'strategy' is 'block'"),
        (changed("actorder", "group"), "'actorder' is 'group'"),
        (changed("format", "float-quantized"), "'format' is 'float-quantized'"),
        (changed("transform_config", {"config_groups": {"R1": {}}}), "'transform_config' is given"),
        (changed("sparsity_config", {"format": "sparse-24-bitmask"}), "'sparsity_config' is given"),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "'quant_algo' is 'FP8'; only 'NVFP4'"),
        ({"quant_method": "mxfp4"}, "quantised by 'mxfp4'; supported are 'fp8'"),
        ({"quant_method": "awq", "bits": 4}, "quantised by 'awq'"),
    ],
)
def test_other_quantisations_are_refused_by_name(quantised: dict[str, Any], message: str) -> None:
    spec_of({**CONFIG, "quantization_config": COMPRESSED})
    spec_of({**CONFIG, "quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}})
    with pytest.raises(ValueError, match=message):
        spec_of({**CONFIG, "quantization_config": quantised})
