"""The weights that the student samples with are those that are trained, with their adapters merged."""

from dataclasses import replace

import pytest
import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from distill.engine import Engine
from distill.engine.options import EngineOptions
from distill.models import Model
from distill.recipe import Train
from distill.recipe.adapters import Lora
from distill.train.rollouts.student import tensors_of
from distill.train.student import methods
from distill.train.student import model as student

SMALL = {
    "vocab_size": 80,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
GEMMA4 = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 80, "final_logit_softcapping": 20.0}
GEMMA4 |= {"head_dim": 8, "global_head_dim": 16, "sliding_window": 4, "pad_token_id": None}
DELTA = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "pad_token_id": None,
}
FAMILIES = {
    "gemma4_text": (Gemma4ForCausalLM, Gemma4TextConfig(**SMALL, **GEMMA4)),
    "qwen2": (Qwen2ForCausalLM, Qwen2Config(**SMALL, tie_word_embeddings=True)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**SMALL, head_dim=16, tie_word_embeddings=False)),
    "llama": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=False)),
    "smollm3": (SmolLM3ForCausalLM, SmolLM3Config(**SMALL, pad_token_id=None, no_rope_layers=[1, 0])),
    "qwen3_5": (Qwen3_5ForCausalLM, Qwen3_5TextConfig(**SMALL, **DELTA)),
    "llama-tied": (LlamaForCausalLM, LlamaConfig(**SMALL, tie_word_embeddings=True)),
}
TOKENS = [1, 5, 9, 70, 33, 2, 18, 64, 7]


def trained(family, adapter=None):
    """A model after a few steps of an optimiser, and PEFT's view of it."""
    kind, config = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config)
    adapted = None if adapter is None else methods.with_adapters(model, adapter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = torch.tensor([TOKENS])
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, adapted


def expected(model, tokens=TOKENS):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return [logits[i, token].item() for i, token in enumerate(tokens[1:])]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [None, Lora(kind="lora", r=4, alpha=16)], ids=["all", "lora"])
def test_the_engine_computes_what_the_trainer_does(tmp_path, family, adapter):
    kind, config = FAMILIES[family]
    torch.manual_seed(1)
    kind(config).save_pretrained(tmp_path)  # other weights than those that are trained
    model, adapted = trained(family, adapter)
    engine = Engine.load(tmp_path, EngineOptions(device="cpu", dtype="float32", max_batch=2, max_context=64))
    before = engine.score([TOKENS], 1)[0].logprobs
    engine.update(tensors_of(model))
    after = engine.score([TOKENS], 1)[0].logprobs
    engine.close()
    assert after == pytest.approx(expected(model), abs=1e-5)
    assert before != pytest.approx(after, abs=1e-2)
    if adapted is None:
        return
    tensor = tensors_of(model)
    got = {
        name: tensor(name).clone()
        for name in kind(config).state_dict()
        if name in dict(kind(config).named_parameters())
    }
    merged = adapted.merge_and_unload().state_dict()
    changed = 0
    for name, ours in got.items():
        assert torch.allclose(ours, merged[name], atol=1e-6), name
        changed += "_proj" in name
    assert changed >= 14


def test_adapters_of_some_layers_leave_the_others():
    model, _ = trained("qwen2", Lora(kind="lora", r=4, alpha=16, target_modules=("q_proj",)))
    tensor = tensors_of(model)
    base = dict(model.named_parameters())
    name = "model.layers.0.self_attn.{}_proj.{}"
    assert tensor(name.format("k", "weight")).equal(base[name.format("k", "weight")])
    assert tensor(name.format("q", "bias")).equal(base["model.layers.0.self_attn.q_proj.base_layer.bias"])
    assert not tensor(name.format("q", "weight")).equal(base["model.layers.0.self_attn.q_proj.base_layer.weight"])
    with pytest.raises(KeyError):
        tensor("model.layers.9.self_attn.q_proj.weight")


def test_a_4_bit_base_is_dequantised(tmp_path):
    """Not the base of the directory, which differs, but what the trainer's forward pass computes with."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install 'distill[qlora]'")
    kind, config = FAMILIES["llama"]
    torch.manual_seed(1)
    kind(config).save_pretrained(tmp_path)
    settings = Train.model_validate({"adapter": {"kind": "qlora", "r": 4, "alpha": 16}, "dtype": "float32"})
    model = student.load(tmp_path, settings, torch.float32, methods.quantization(settings))
    model.set_attn_implementation("eager")
    methods.with_adapters(model, settings.adapter)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.1)
    engine = Engine.load(tmp_path, EngineOptions(device="cpu", dtype="float32", max_batch=2, max_context=64))
    before = engine.score([TOKENS], 1)[0].logprobs
    engine.update(tensors_of(model))
    after = engine.score([TOKENS], 1)[0].logprobs
    engine.close()
    assert before != pytest.approx(after, abs=1e-3)
    for mode in (True, False):  # bitsandbytes would repack the weights in the second
        assert after == pytest.approx(expected(model.train(mode)), abs=1e-5)


LONG = [3 + i * 7 % 70 for i in range(200)]  # past the base's 128 positions
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize("rope_theta", [None, 1e6])
@pytest.mark.parametrize("rope", [{}, LLAMA3 | {"original_max_position_embeddings": 64}], ids=["plain", "llama3"])
def test_an_extended_context_is_the_engine_s_too(tmp_path, rope, rope_theta):
    """Positions past those of the base, and the RoPE base: the engine's log-probabilities are the trainer's."""
    torch.manual_seed(1)
    config = LlamaConfig(**SMALL, tie_word_embeddings=True, **({"rope_parameters": rope} if rope else {}))
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    options = EngineOptions(device="cpu", dtype="float32", max_batch=2, max_context=256)
    settings = Train(max_position_embeddings=256, rope_theta=rope_theta)
    trainer = student.load(tmp_path, settings, torch.float32)
    trainer.set_attn_implementation("eager")
    with student.as_trained(Model("base", tmp_path), settings) as base:
        engine = Engine.load(base.directory, options)
        ours = engine.score([LONG], 1)[0].logprobs
        engine.close()
    assert ours == pytest.approx(expected(trainer, LONG), abs=1e-5)
    with student.as_trained(Model("base", tmp_path), Train()) as base:
        assert base.directory == tmp_path
        engine = Engine.load(base.directory, replace(options, max_context=128))
        plain = engine.score([LONG[:100]], 1)[0].logprobs
        engine.close()
    assert (plain == pytest.approx(ours[:99], abs=1e-5)) == (rope_theta is None), "the RoPE base did nothing"
