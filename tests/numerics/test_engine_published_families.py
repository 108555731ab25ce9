"""Directories laid out like the published repositories of GLM-5.2 and SmolLM3, only with tiny sizes, load as they are:
index, shards, bfloat16 weights, config with every published key, tokenizer. transformers reads the same directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_checks import engine_logits, relative_error
from random_models import GLM, SMOLLM3, build
from safetensors.torch import load_file
from test_engine_published import write_shards
from transformers import AutoModelForCausalLM

from distill import catalog
from distill.backends import Job, SamplingParams
from distill.backends.local import LocalBackend
from distill.errors import UserError
from distill.models import Model
from distill.prompts import Prompt
from distill.recipe import LocalEngine

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 576, "bos_token_id": 554, "eos_token_id": [555], "pad_token_id": 555}
GLM_5_2: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "eos_token_id": [555],
    "ep_size": 1,
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 64,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "index_topk": 24,
    "index_topk_freq": 2,
    "index_skip_topk_offset": 1,
    "indexer_rope_interleave": True,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "kv_lora_rank": 32,
    "max_position_embeddings": 202752,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "model_type": "glm_moe_dsa",
    "moe_intermediate_size": 40,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 555,
    "pretraining_tp": 1,
    "q_lora_rank": 48,
    "qk_head_dim": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-05,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "transformers_version": "5.0.2.dev0",
    "use_cache": True,
    "v_head_dim": 20,
    "vocab_size": 576,
}
SMOLLM3_3B: dict[str, Any] = {
    "architectures": ["SmolLM3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 554,
    "eos_token_id": 555,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    "layer_types": ["full_attention"] * 4,
    "max_position_embeddings": 65536,
    "max_window_layers": 28,
    "mlp_bias": False,
    "model_type": "smollm3",
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0],
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 555,
    "pretraining_tp": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 5000000.0,
    "sliding_window": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0.dev0",
    "use_cache": False,
    "use_sliding_window": False,
    "vocab_size": 576,
}  # head and embedding are tied, which the published file does not say
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "teacher": ({**GLM, **SIZES, "index_topk_freq": 2, "index_skip_topk_offset": 1, "draft_layer": False}, GLM_5_2),
    "student": ({**SMOLLM3, **SIZES, "rms_norm_eps": 1e-6, "tie_word_embeddings": True}, SMOLLM3_3B),
}


def publish(path: Path, kind: str) -> Path:
    """A directory with random weights, and the tokenizer of the embedded models."""
    sizes, config = PUBLISHED[kind]
    build(path, {key: value for key, value in sizes.items() if key != "draft_layer"})
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    kept = "e_score_correction_bias"
    write_shards(path, {name: t if name.endswith(kept) else t.bfloat16() for name, t in tensors.items()})
    (path / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(ROOT / "teachers" / "tiny-r1" / name, path)
    return path


def card_of(path: Path, kind: str, family: str, file: Path) -> Path:
    fields = {"name": "mine", "family": family, "weights": str(path), "parameters": 0.001, "context": 1024}
    fields |= {"license": "mit"} | ({"active_parameters": 0.001} if kind == "teacher" else {})
    file.write_text(yaml.safe_dump(fields), encoding="utf-8")
    return file


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_published_directory_loads_as_it_is(kind: Any, tmp_path: Path) -> None:
    path = publish(tmp_path / "model", kind)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    card = str(card_of(path, kind, PUBLISHED[kind][1]["model_type"], tmp_path / "card.yaml"))
    assert catalog.resolve_weights(kind, card) == path
    backend = LocalBackend.load(Model("m", path), LocalEngine(dtype="float32"))
    greedy = SamplingParams(temperature=0, top_p=1, max_new_tokens=12)
    (done,) = backend.complete([Job(Prompt.from_question("What is 12 + 30?", "42"), (0,))], greedy, seed=0)

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    tokens = [*done.prompt_token_ids, *done.completion_token_ids]
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens]), use_cache=False).logits[0]
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    error, report = relative_error(engine_logits(backend.engine, tokens), theirs)
    assert error <= 1e-4, report
    at = len(done.prompt_token_ids) - 1
    assert theirs[at:-1].argmax(-1).tolist() == list(done.completion_token_ids)
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before


@pytest.mark.parametrize(("kind", "family"), [("teacher", "deepseek_v32"), ("student", "llama")])
def test_a_card_of_another_family_is_refused_when_its_weights_are_read(kind: Any, family: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    publish(path, kind)
    card = str(card_of(path, kind, family, tmp_path / "card.yaml"))
    named = PUBLISHED[kind][1]["model_type"]
    with pytest.raises(UserError, match=rf"card.yaml contradicts .*config.json: family is {family}, and {named} there"):
        catalog.resolve_weights(kind, card)
    if kind == "student":  # whatever training does not know is not trained as another family
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps({**config, "model_type": "mistral"}))
        with pytest.raises(UserError, match="family is llama, and mistral there"):
            catalog.resolve_weights(kind, card)
