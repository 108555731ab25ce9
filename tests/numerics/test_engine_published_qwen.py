"""A directory laid out like the published repositories of Qwen3.5, only with tiny sizes: a vision encoder and a layer
that drafts beside the language model, which alone is read, by the engine and by training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from random_models import _scale_weights
from safetensors.torch import load_file
from test_engine_published import write_shards
from test_engine_published_families import card_of
from transformers import AutoModelForCausalLM, Qwen3_5Config, Qwen3_5ForConditionalGeneration

from distill import catalog, model_cards
from distill.backends import Job, SamplingParams
from distill.backends.local import LocalBackend
from distill.engine import Engine
from distill.engine.families import read_spec, spec_of
from distill.models import Model
from distill.prompts import Prompt
from distill.recipe import LocalEngine, Train
from distill.train.rollouts.student import tensors_of
from distill.train.student import model as student

ROOT = Path(__file__).resolve().parents[2]
TEXT: dict[str, Any] = {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attn_output_gate": True,
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": 555,
    "full_attention_interval": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "initializer_range": 0.02,
    "intermediate_size": 112,
    "layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"],
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "mamba_ssm_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_5_text",
    "mtp_num_hidden_layers": 1,
    "mtp_use_dedicated_embeddings": False,
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
    "tie_word_embeddings": True,
    "use_cache": True,
    "vocab_size": 576,
}
QWEN3_5: dict[str, Any] = {
    "architectures": ["Qwen3_5ForConditionalGeneration"],
    "image_token_id": 570,
    "model_type": "qwen3_5",
    "text_config": TEXT,
    "tie_word_embeddings": True,
    "transformers_version": "4.57.0.dev0",
    "video_token_id": 571,
    "vision_config": {
        "deepstack_visual_indexes": [],
        "depth": 1,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": 32,
        "in_channels": 3,
        "initializer_range": 0.02,
        "intermediate_size": 48,
        "model_type": "qwen3_5",
        "num_heads": 2,
        "num_position_embeddings": 16,
        "out_hidden_size": 64,
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    },
    "vision_end_token_id": 573,
    "vision_start_token_id": 572,
}


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index, shards, bfloat16 weights but for two kinds of tensor, config with the published keys, tokenizer."""
    path = tmp_path_factory.mktemp("published") / "model"
    path.mkdir()
    model = Qwen3_5ForConditionalGeneration(Qwen3_5Config(**QWEN3_5)).float().eval()
    _scale_weights(model, 0)
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    tensors |= {f"mtp.{name}": torch.randn(4, 4) for name in ("fc.weight", "layers.0.mlp.up_proj.weight")}
    wide = ("A_log", "linear_attn.norm.weight")
    write_shards(path, {name: t if name.endswith(wide) else t.bfloat16() for name, t in tensors.items()})
    (path / "config.json").write_text(json.dumps(QWEN3_5, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(ROOT / "teachers" / "tiny-r1" / name, path)
    return path


def logits(path: Path, tokens: list[int]) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0]


def test_it_loads_as_it_is(published: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    names = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name.split(".")[1] for name in names} >= {"language_model", "visual"} and "mtp.fc.weight" in names
    card = str(card_of(published, "student", "qwen3_5", tmp_path / "card.yaml"))
    assert catalog.resolve_weights("student", card) == published
    backend = LocalBackend.load(Model("m", published), LocalEngine(dtype="float32"))
    greedy = SamplingParams(temperature=0, top_p=1, max_new_tokens=12)
    (done,) = backend.complete([Job(Prompt.from_question("What is 12 + 30?", "42"), (0,))], greedy, seed=0)
    tokens = [*done.prompt_token_ids, *done.completion_token_ids]
    theirs = logits(published, tokens)
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    error, report = relative_error(engine_logits(backend.engine, tokens), theirs)
    assert error <= 1e-4, report
    assert theirs[len(done.prompt_token_ids) - 1 : -1].argmax(-1).tolist() == list(done.completion_token_ids)
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before


def test_training_takes_the_language_model_out_of_it(published: Path, tmp_path: Path) -> None:
    """And the engine takes the trained weights by its names; what is saved is read under the names that it then has."""
    settings = Train(max_length=64)
    assert student.inspect(published, settings).vocabulary == 576
    trained = student.load(published, settings, torch.float32)
    assert trained.config.model_type == "qwen3_5_text" and type(trained).__name__ == "Qwen3_5ForCausalLM"
    engine = Engine.load(published, engine_options(cache_tokens=256, max_context=128))
    tokens = some_tokens(40, vocab=500)
    before = engine_logits(engine, tokens)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.05)
    engine.update(tensors_of(trained))
    trained.set_attn_implementation("sdpa")  # that of the training wants rows
    with torch.inference_mode():
        theirs = trained(torch.tensor([tokens]), use_cache=False).logits[0]
    error, report = relative_error(engine_logits(engine, tokens), theirs)
    assert error <= 1e-4, report
    assert relative_error(before, theirs)[0] > 1e-2
    trained.save_pretrained(tmp_path)
    assert "model.language_model.norm.weight" in load_file(tmp_path / "model.safetensors")
    student.spell_for_transformers_4(tmp_path / "config.json")
    assert read_spec(tmp_path).family == "qwen3_5_text"
    saved = Engine.load(tmp_path, engine_options(cache_tokens=256, max_context=128))
    assert torch.equal(engine_logits(saved, tokens), engine_logits(engine, tokens))


def test_shards_are_filled_from_the_published_names(published: Path) -> None:
    settings = Train(dtype="float32")
    model = student.empty(published, settings, torch.float32).to_empty(device="cpu")
    model.tie_weights()
    student.fill(model, published)
    whole = student.stored_tensors(student.load(published, settings, torch.float32))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in student.stored_tensors(model).items())


def test_a_directory_alone_has_a_card(published: Path) -> None:
    card = model_cards.student_card(published)
    assert (card.family, card.context) == ("qwen3_5", 262144) and card.architecture is not None
    assert card.architecture.linear_num_value_heads == 4 and card.architecture.tie_word_embeddings


def test_both_configs_are_one_model() -> None:
    whole, text = spec_of(QWEN3_5), spec_of(TEXT)
    assert (whole.family, text.family) == ("qwen3_5", "qwen3_5_text")
    assert whole.rope == text.rope and whole.rope.dim == 8 and whole.delta == text.delta and whole.delta is not None
    assert spec_of({key: value for key, value in TEXT.items() if key != "layer_types"}) == text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_config": None}, "'text_config' is missing; it describes the language model"),
        ({"tie_word_embeddings": False}, "'tie_word_embeddings' is False, and True in 'text_config'; correct the one"),
        ({"layer_types": ["linear_attention"] * 4}, "has no 'full_attention'; at least one such layer is needed"),
        (
            {"layer_types": ["sliding_attention"] * 4},
            "'layer_types' has sliding_attention; only 'linear_attention' and",
        ),
        ({"linear_num_value_heads": 3}, "'linear_num_value_heads' 3 is no multiple of 'linear_num_key_heads' 2"),
        ({"linear_conv_kernel_dim": 1}, "'linear_conv_kernel_dim' is 1; it must be from 2"),
        ({"linear_key_head_dim": None}, "'linear_key_head_dim' is missing"),
        ({"head_dim": None}, "'head_dim' is missing"),
        ({"attn_output_gate": False}, "'attn_output_gate' is False; only True"),
        ({"output_gate_type": "sigmoid"}, "'output_gate_type' is 'sigmoid'"),
        ({"mamba_ssm_dtype": "bfloat16"}, "'mamba_ssm_dtype' is 'bfloat16'"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_parameters": {"partial_rotary_factor": 0.03}}, "0 dimensions of a head are rotated.* at least 2"),
    ],
)
def test_configs_that_are_refused(change: dict[str, Any], words: str) -> None:
    outer = change.keys() <= {"text_config", "tie_word_embeddings"}
    config = {**QWEN3_5, **change} if outer else {**QWEN3_5, "text_config": {**TEXT, **change}}
    with pytest.raises(ValueError, match=words) as caught:
        spec_of(config)
    assert "\n" not in str(caught.value)


def test_drafts_are_refused(published: Path) -> None:
    with pytest.raises(ValueError, match="this model has no layer that drafts: set 0"):
        Engine.load(published, engine_options(num_speculative_tokens=1))
