"""Configs and weight files: both spellings, the published numbers, and every way a directory can be broken."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from random_models import CONFIGS, KIMI_K2, LLAMA, SMOLLM3, V2, V3, V3_YARN, V32, YARN, Checkpoint, build, write
from safetensors.torch import load_file

from distill.engine import Engine
from distill.engine.families import read_spec, spec_of
from distill.engine.kernels import cpu

R1 = {
    **{"model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432},
    **{"moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128},
    **{"n_shared_experts": 1, "n_routed_experts": 256, "routed_scaling_factor": 2.5, "kv_lora_rank": 512},
    **{"q_lora_rank": 1536, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 8},
    **{"topk_group": 4, "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1},
    **{"norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1},
    **{"hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-06, "rope_theta": 10000},
    **{"rope_scaling": {**YARN, "original_max_position_embeddings": 4096}, "torch_dtype": "bfloat16"},
    **{"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
    **{"attention_bias": False, "tie_word_embeddings": False, "ep_size": 1, "aux_loss_alpha": 0.001},
}


def test_the_published_r1_config() -> None:
    spec = spec_of(R1)
    assert spec.moe is not None and spec.mla is not None
    assert (spec.num_layers, spec.num_nextn_predict_layers, spec.max_context) == (61, 1, 163840)
    assert (spec.cache_heads(0), spec.cache_dims(0)) == (1, (576,))
    assert 2 * spec.cache_elements_per_token() == 70_272, "70 KB a token in bf16"
    assert spec.softmax_scale == pytest.approx(192**-0.5 * (0.1 * 3.6888795 + 1) ** 2)
    assert spec.rope.magnitude == 1.0 and spec.rope.interleaved
    assert spec.rope.inv_freq[0] == 1.0
    assert spec.rope.inv_freq[-1] == pytest.approx(10000 ** (-62 / 64) / 40)
    assert [spec.is_moe_layer(i) for i in (0, 2, 3, 60)] == [False, False, True, True]


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        ({}, {3, 7}),
        ({"no_rope_layer_interval": 3}, {2, 5}),
        ({"no_rope_layer_interval": 3, "no_rope_layers": [1, 0, 1, 1, 1, 1, 1, 1]}, {1}),
        ({"no_rope_layers": [1] * 9 + [0]}, set()),
        ({"no_rope_layers": [1] * 7}, "'no_rope_layers' has 7 entries, and there are 8 layers"),
        ({"no_rope_layers": [2] * 8}, "'no_rope_layers' is .* integers from 0 to 1"),
        ({"no_rope_layers": "none"}, "'no_rope_layers' is 'none'"),
        ({"no_rope_layer_interval": 0}, "'no_rope_layer_interval' is 0"),
        ({"use_sliding_window": True}, "'use_sliding_window' is True"),
    ],
)
def test_layers_without_rotary_embedding(change: dict[str, Any], layers: set[int] | str) -> None:
    config = {**SMOLLM3, "num_hidden_layers": 8, **change}
    if isinstance(layers, str):
        with pytest.raises(ValueError, match=layers):
            spec_of(config)
    else:
        assert spec_of(config).nope_layers == layers


def test_what_smollm3_takes_where_its_config_is_silent() -> None:
    spec = spec_of({key: value for key, value in SMOLLM3.items() if key not in ("rope_theta", "tie_word_embeddings")})
    assert spec.tied_embeddings and spec.rope.inv_freq[1] == pytest.approx(2e6 ** (-2 / 16))


@pytest.mark.parametrize("name", CONFIGS)
def test_both_spellings_give_one_spec(name: str, checkpoint: Callable[[str], Checkpoint]) -> None:
    ckpt = checkpoint(name)
    new_spelling = json.loads(ckpt.model.config.to_json_string(use_diff=False))
    assert "rope_parameters" in new_spelling and "rope_scaling" not in new_spelling
    assert spec_of(new_spelling) == read_spec(ckpt.path)


def test_reading_a_spec_imports_no_torch() -> None:
    code = (
        "import sys, distill, distill.engine.families; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "mamba"},
            "model_type is 'mamba'; supported are deepseek_v2, .*, llama, qwen2",
        ),
        ({"model_type": None}, "model_type is None"),
        ({"hidden_size": None}, "'hidden_size' is missing"),
        ({"hidden_size": "64"}, "'hidden_size' is '64'; it must be of type int"),
        ({"num_hidden_layers": -1}, "it must be from 1 to 4096"),
        ({"scoring_func": "softmax"}, "'scoring_func' is 'softmax'"),
        ({"topk_method": "greedy"}, "'topk_method' is 'greedy'"),
        ({"n_group": 5}, "16 experts in 5 groups"),
        ({"num_experts_per_tok": 9}, "9 experts per token do not fit"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2}}, "RoPE type 'dynamic'"),
        ({"rope_scaling": {"type": "yarn"}}, "needs 'factor'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised by 'gptq'"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**V3, **change}))
    with pytest.raises(ValueError, match=message) as caught:
        read_spec(tmp_path)
    assert str(tmp_path / "config.json") in str(caught.value) and "\n" not in str(caught.value)


WRONG: dict[str, tuple[object, ...]] = {
    "bos_token_id": ("1", 1.5, True, ["x"], {}, 10**40),
    "eos_token_id": ("1", [[1]], {"a": 1}),
    "use_cache": ("yes", 1, [], 0),
    "layer_types": ("full_attention", [1], {}, ["full_attention"] * 2),
    "torch_dtype": (16, [], True),
    "dtype": (32,),
    "architectures": ("LlamaForCausalLM", [None]),
    "rms_norm_eps": (0, 0.0, -1e-6, 2.0, "1e-6", float("nan"), float("inf"), 10**400, True),
    "vocab_size": (0, -1, 1.5, "300", True, 2**31, 10**40, []),
    "hidden_size": (0, 63, 2**25),
    "num_hidden_layers": (0, 5000, 10**9),
    "num_attention_heads": (0, 3, -4),
    "num_key_value_heads": (0, 3, 8, "2"),
    "head_dim": (0, 15, 2**20, "16"),
    "intermediate_size": (0, None),
    "max_position_embeddings": (0, None, -1, 2**40),
    "rope_theta": (0, 1, -5.0, "x", float("nan"), 10**400),
    "rope_scaling": ("yarn", [1], {"type": 5}, {"type": "dynamic"}, {"type": "linear"}, {"type": "yarn", "factor": 0}),
    "tie_word_embeddings": (0, "true"),
    "attention_bias": ("no", 1),
    "mlp_bias": (2,),
    "hidden_act": (5, "gelu"),
    "quantization_config": ("fp8", [1], {"quant_method": 5}, {"quant_method": "fp8", "scale_fmt": "x"}),
    "initializer_range": ("x", -1),
    "use_sliding_window": (True, 0, "no"),
    "model_type": (5, None, ["llama"], "x" * 10_000),
}  # fmt: skip


@pytest.mark.parametrize("key", WRONG)
def test_every_key_has_a_type_and_a_range(key: str) -> None:
    for value in WRONG[key]:
        with pytest.raises(ValueError, match=key) as caught:
            spec_of({**LLAMA, key: value}, "config.json")
        message = str(caught.value)
        assert message.startswith("config.json") and "\n" not in message and len(message) < 400, message


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "yarn", "factor": 0},
        {"type": "yarn", "factor": 4, "beta_fast": 0},
        {"type": "yarn", "factor": 4, "mscale": "x"},
        {"type": "yarn", "factor": 4, "attention_factor": -1},
        {"type": "yarn", "factor": 4, "original_max_position_embeddings": 0},
        {"type": "yarn", "factor": 4, "truncate": "no"},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4},
        {"rope_type": "llama3", "factor": 8, "low_freq_factor": 1},
        {"rope_type": "default", "rope_theta": 0},
        {"rope_type": "default", "partial_rotary_factor": 0.5},
    ],
)
def test_values_of_a_scaling_rule_are_checked(scaling: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="config: rope_scaling"):
        spec_of({**LLAMA, "rope_scaling": scaling})


@pytest.mark.parametrize("config", [V3, V32, KIMI_K2], ids=["v3", "v32", "kimi-k2"])
@pytest.mark.parametrize("key", ["n_group", "topk_group", "routed_scaling_factor"])
def test_keys_of_the_router_whose_defaults_differ_between_programs_are_required(
    key: str, config: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=key):
        spec_of({name: value for name, value in config.items() if name != key})


def test_without_a_method_v2_ignores_groups() -> None:
    """As transformers does."""
    spec = spec_of({key: value for key, value in V2.items() if key != "topk_method"})
    assert spec.moe is not None and (spec.moe.groups, spec.moe.groups_kept) == (1, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_interleave", False),
        ("indexer_rope_interleave", True),
        ("num_experts", 8),
        ("mlp_layer_types", ["sparse", "dense", "sparse"]),
    ],
)
def test_other_forms_of_sparse_attention_are_refused(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=key):
        spec_of({**V32, key: value})


DEEPSEEK_WRONG: dict[str, tuple[object, ...]] = {
    "q_lora_rank": (0, "48"),
    "kv_lora_rank": (0, None),
    "qk_rope_head_dim": (15, 0),
    "n_routed_experts": (0, 2**20, 15),
    "num_experts_per_tok": (0, 17),
    "n_group": (0, -1),
    "topk_group": (0, 5),
    "routed_scaling_factor": (0, "x", float("inf")),
    "first_k_dense_replace": (-1, "1"),
    "moe_layer_freq": (2, True),
    "norm_topk_prob": (1,),
    "rope_interleave": ("x",),
    "num_nextn_predict_layers": (-1, 10**6),
}


@pytest.mark.parametrize("key", DEEPSEEK_WRONG)
def test_every_key_of_deepseek_has_a_type_and_a_range(key: str) -> None:
    for value in DEEPSEEK_WRONG[key]:
        with pytest.raises(ValueError, match="^config: ") as caught:
            spec_of({**V3, key: value})
        assert "\n" not in str(caught.value)


def test_sliding_windows_and_odd_heads_are_refused() -> None:
    for change, message in (
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"num_key_value_heads": 3}, "'num_attention_heads' 4 is no multiple of 'num_key_value_heads' 3"),
    ):
        with pytest.raises(ValueError, match=message):
            spec_of({**LLAMA, **change})


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    build(path, {**V3_YARN, "hidden_size": 160}, fp8=True)
    return path


@pytest.fixture
def broken(published: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(published, tmp_path / "model"))


def refused(path: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        Engine.load(path, engine_options(cache_tokens=64))
    assert str(path) in str(caught.value), "the file is named"
    assert "\n" not in str(caught.value)


def test_no_config(tmp_path: Path) -> None:
    refused(tmp_path, "config.json: no such file")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "not valid JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "holds a list")


def test_no_weights(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    refused(broken, "neither model.safetensors nor model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_truncated_weights(keep: int, broken: Path) -> None:
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(broken, "model.safetensors: not a complete safetensors file")


def test_missing_shard(broken: Path) -> None:
    write(broken, load_file(broken / "model.safetensors"), shards=3)
    (broken / "model-00002-of-00003.safetensors").unlink()
    refused(broken, "model-00002-of-00003.safetensors: shard is missing")


def test_an_index_that_disagrees_with_its_shards(broken: Path) -> None:
    write(broken, load_file(broken / "model.safetensors"), shards=2)
    shutil.copy(broken / "model-00001-of-00002.safetensors", broken / "model-00002-of-00002.safetensors")
    refused(broken, r"model-00002-of-00002.safetensors: tensor \S+ cannot be read")
    (broken / "model.safetensors.index.json").write_text("{}")
    refused(broken, "not a safetensors index")


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/etc/hostname", "", 7, None])
def test_an_index_that_leaves_its_directory(name: object, broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    index = broken / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    refused(broken, "the file of tensor model.norm.weight is .*, not a name")


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_git_lfs_pointers(file: str, broken: Path) -> None:
    (broken / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(broken, f"{file} is a Git LFS pointer, not the file: run `git lfs pull` in ")


def test_json_that_is_too_deep_or_too_large(broken: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (broken / "config.json").write_text("[" * 100_000)
    refused(broken, "config.json: nested too deeply")
    (broken / "config.json").write_text('{"vocab_size": ' + "9" * 5000 + "}")
    refused(broken, "config.json: not valid JSON")
    monkeypatch.setattr("distill.engine.config.MOST_BYTES", 1000)
    refused(broken, "config.json: 5,016 bytes; at most 1,000 are read")


def test_tied_embeddings_with_another_head_are_refused(tmp_path: Path) -> None:
    """transformers 5 would use both, transformers 4 and FSDP the embedding alone."""
    ckpt = build(tmp_path / "tied", {**LLAMA, "tie_word_embeddings": True})
    embedding = ckpt.tensors["model.embed_tokens.weight"]
    write(ckpt.path, {**ckpt.tensors, "lm_head.weight": embedding})
    Engine.load(ckpt.path, engine_options(cache_tokens=64))
    other = embedding.clone()
    other[3, 4] += 1
    write(ckpt.path, {**ckpt.tensors, "lm_head.weight": other})
    refused(ckpt.path, "tensor lm_head.weight differs from model.embed_tokens.weight, and config.json ties them")
    write(ckpt.path, {**ckpt.tensors, "lm_head.weight": embedding.bfloat16()})
    refused(ckpt.path, "set tie_word_embeddings to false")


DOWN = "model.layers.1.mlp.experts.3.down_proj.weight"


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    write(path, tensors)


def test_missing_tensor(broken: Path) -> None:
    rewrite(broken, lambda t: (t.pop(DOWN), t.pop(DOWN + "_scale_inv")))
    refused(broken, f"tensor {DOWN} is missing")


def test_missing_scale(broken: Path) -> None:
    rewrite(broken, lambda t: t.pop(DOWN + "_scale_inv"))
    refused(broken, f"tensor {DOWN} is FP8 but {DOWN}_scale_inv is missing")


def test_scale_of_other_blocks(broken: Path) -> None:
    rewrite(broken, lambda t: t.update({DOWN + "_scale_inv": torch.ones(3, 1)}))
    refused(broken, rf"tensor {DOWN}_scale_inv has shape \[3, 1\], config.json makes it \[2, 1\]")


def test_wrong_shape(broken: Path) -> None:
    rewrite(broken, lambda t: t.update({"model.norm.weight": torch.ones(64)}))
    refused(broken, r"tensor model.norm.weight has shape \[64\], config.json makes it \[160\]")


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_nan_codes(code: int, broken: Path) -> None:
    def poison(tensors: dict[str, torch.Tensor]) -> None:
        tensors[DOWN].view(torch.uint8)[3, 4] = code

    rewrite(broken, poison)
    refused(broken, f"tensor {DOWN} holds FP8 NaN codes")


def test_damaged_scale(broken: Path) -> None:
    rewrite(broken, lambda t: t[DOWN + "_scale_inv"].fill_(float("nan")))
    refused(broken, f"tensor {DOWN}_scale_inv is not finite")


def test_a_dtype_that_is_not_a_weight(broken: Path) -> None:
    rewrite(broken, lambda t: t.update({"model.norm.weight": torch.ones(160, dtype=torch.int8)}))
    refused(broken, "tensor model.norm.weight is I8")


def test_an_unexpected_tensor_is_refused_and_a_draft_layer_is_not(broken: Path) -> None:
    rewrite(broken, lambda t: t.update({"model.layers.3.eh_proj.weight": torch.ones(4, 4)}))
    Engine.load(broken, engine_options(cache_tokens=64))
    rewrite(broken, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(8)}))
    Engine.load(broken, engine_options(cache_tokens=64))
    rewrite(broken, lambda t: t.update({"model.layers.2.self_attn.o_proj.bias": torch.ones(160)}))
    refused(broken, "tensor model.layers.2.self_attn.o_proj.bias has no place")


@pytest.mark.one_in(3)
@pytest.mark.parametrize(("nope", "v"), [(64, 64), (32, 96), (128, 128), (64, 128), (24, 20)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_of_kv_b_in_any_cut_of_its_blocks(nope: int, v: int, dtype: torch.dtype, tmp_path: Path) -> None:
    """In the published shapes the rows of a head lie in whole blocks, and stay FP8; elsewhere they are dequantised."""
    ckpt = build(tmp_path, {**V3_YARN, "qk_nope_head_dim": nope, "v_head_dim": v, "kv_lora_rank": 160}, fp8=True)
    tokens = some_tokens(40)
    for kernels in ("reference", *([] if cpu.why_missing() else ["cpu"])):
        engine = Engine.load(ckpt.path, engine_options(dtype=dtype, cache_tokens=64, kernels=kernels))
        ours, theirs = engine_logits(engine, tokens, decode_from=20), ckpt.logits(tokens)
        error, report = relative_error(ours, theirs)
        if dtype == torch.float32:
            assert error < 1e-4, f"{kernels}: {report}"
        else:  # rounding changes some tokens' experts, and then their logits by much
            assert (ours - theirs).abs().median() < 0.05 * theirs.std(), f"{kernels}: {report}"


def test_scales_as_powers_of_two_in_one_byte(broken: Path) -> None:
    """V3.1's `ue8m0`: the same powers of two, stored as float8_e8m0fnu, give the same model."""
    tensors = load_file(broken / "model.safetensors")
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].log2().round().exp2()
    write(broken, tensors)
    tokens = some_tokens(20)
    in_float32 = engine_logits(Engine.load(broken, engine_options(cache_tokens=64)), tokens)
    for name in [n for n in tensors if n.endswith("_scale_inv")]:
        tensors[name] = tensors[name].to(torch.float8_e8m0fnu)
    write(broken, tensors)
    assert torch.equal(engine_logits(Engine.load(broken, engine_options(cache_tokens=64)), tokens), in_float32)


def test_half_precision_checkpoints(broken: Path, tmp_path: Path) -> None:
    """bf16 weights are read as they are and computed in float32."""
    ckpt = build(tmp_path / "bf16", LLAMA)
    write(ckpt.path, {name: tensor.bfloat16() for name, tensor in ckpt.tensors.items()})
    with torch.no_grad():
        for parameter in ckpt.model.parameters():
            parameter.copy_(parameter.bfloat16())
    engine = Engine.load(ckpt.path, engine_options(cache_tokens=256, kernels="reference"))
    assert engine.numerics.to_json() == {
        "kernels": "reference",
        "matrix_products": "library",
        "weights": "bfloat16",
        "activations": "float32",
        "cache": "float32",
    }
    for each in (engine, Engine.load(ckpt.path, engine_options(cache_tokens=256))):
        error, report = relative_error(engine_logits(each, some_tokens(50)), ckpt.logits(some_tokens(50)))
        assert error <= 1e-4, report
