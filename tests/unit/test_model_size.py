"""What is counted and measured on a model without its weights, held against the model."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PretrainedConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import train_support

from distill.recipe import Train
from distill.train.ranks import model_size
from distill.train.student import float8, methods

TINY = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 16}
SLIDING, WHOLE = "sliding_attention", "full_attention"
KEPT = {"jamba": train_support.JAMBA}


def test_routed_experts_have_a_width_of_their_own() -> None:
    """16 · 64 of the hidden states and 5 · (2 · 32) of two experts, in bfloat16."""
    config = AutoConfig.for_model("qwen3_moe", **TINY, moe_intermediate_size=32, num_experts=8, num_experts_per_tok=2)
    dtypes = methods.dtypes(Train(dtype="bfloat16"), torch.device("cuda"), sharded=False)
    assert model_size._typical(config, dtypes).layer == 2 * (16 * 64 + 5 * 2 * 32)


def hybrid(family: str) -> PretrainedConfig:
    """Six layers, of which two attend to everything, with wider heads in Gemma."""
    types = [SLIDING, SLIDING, WHOLE, SLIDING, SLIDING, WHOLE]
    if family == "qwen3_5_text":
        types = [{SLIDING: "linear_attention"}.get(kind, kind) for kind in types]
        return AutoConfig.for_model(family, **TINY, **DELTA, head_dim=16, num_hidden_layers=6, layer_types=types)
    wide = {"head_dim": 16, "global_head_dim": 48, "sliding_window": 32, "hidden_size_per_layer_input": 8}
    wide |= {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 96}
    return AutoConfig.for_model(family, **TINY, **wide, num_hidden_layers=6, layer_types=types)


@pytest.mark.one_in(5)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen3_5_text", "gemma4_text"])
def test_layers_of_several_kinds_keep_what_the_whole_model_does(family: str, checkpointing: bool) -> None:
    config, settings = hybrid(family), Train(gradient_checkpointing=checkpointing)
    dtypes = methods.dtypes(settings, torch.device("cuda"))
    few, many = (model_size.saved_bytes(config, settings, dtypes, 6, tokens, "cuda") for tokens in (256, 512))
    counted = model_size.activations(config, settings, dtypes, "cuda")
    assert 6 * counted.layer + counted.rest == pytest.approx((many - few) / 256, rel=0.02)
    assert counted.largest >= counted.layer
    assert model_size.kinds(config) == {0: 4, 2: 2}
    if not checkpointing:  # the kinds differ, so that the first one's alone would be wrong
        first = model_size.per_token(config, settings, dtypes, 2, "cuda", like=0)
        assert abs(first - 2 * counted.layer - counted.rest) > 0.02 * first


@pytest.mark.parametrize(
    "family", [pytest.param("bamba", marks=pytest.mark.slow), pytest.param("jamba", marks=pytest.mark.slow), "lfm2"]
)
def test_kinds_of_layers_that_a_config_computes_are_measured_apart(family: str) -> None:
    """The second layer has attention, and keeps less for the backward pass than a recurrence or a convolution does."""
    config = AutoConfig.for_model(family, **train_support.OTHER, **(train_support.RECURRENT | KEPT)[family])
    settings = Train(gradient_checkpointing=False)
    dtypes = methods.dtypes(settings, torch.device("cpu"))
    few, many = (model_size.saved_bytes(config, settings, dtypes, 2, tokens) for tokens in (256, 512))
    counted = model_size.activations(config, settings, dtypes)
    assert model_size.kinds(config) == {0: 1, 1: 1} and counted.largest > 1.01 * counted.layer
    assert 2 * counted.layer + counted.rest == pytest.approx((many - few) / 256, rel=0.02)
    model = model_size.causal_lm(config)(config)
    assert model_size.shape(config).total == model_size.parameters(model)


def test_what_cannot_be_measured_is_estimated_without_a_traceback(capfd: pytest.CaptureFixture[str]) -> None:
    config = AutoConfig.for_model("qwen3_next", **train_support.OTHER, **train_support.RECURRENT["qwen3_next"])
    dtypes = methods.dtypes(Train(), torch.device("cpu"))
    assert model_size.activations(config, Train(), dtypes) == model_size._typical(config, dtypes)
    assert "Traceback" not in "".join(capfd.readouterr())


def test_layers_that_multiply_in_fp8_are_counted_by_kind() -> None:
    config = hybrid("qwen3_5_text")
    whole, counted = float8.convertible(model_size.on_meta(config, 6).get_decoder()), model_size.converted(config)
    assert 6 * counted.parameters == pytest.approx(whole.parameters, abs=3)
    assert (counted.largest, counted.widest) == (whole.largest, whole.widest)
