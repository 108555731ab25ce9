"""A directory laid out like the published repositories of Gemma 4, with tiny sizes: a language model beside one of
images. The engine reads the first, training trains it alone, and the student is a `gemma4_text`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from gemma4_models import GEMMA4
from random_models import _scale_weights
from test_engine_published import write_shards
from transformers import AutoModelForCausalLM, Gemma4Config, Gemma4ForConditionalGeneration

from distill import catalog, model_cards
from distill.chat import Chat
from distill.engine import Engine
from distill.recipe import Train
from distill.train.rollouts.student import tensors_of
from distill.train.student import model as student

ROOT = Path(__file__).resolve().parents[2]
SIZES = {"vocab_size": 576, "vocab_size_per_layer_input": 576, "bos_token_id": 554, "eos_token_id": 555}
TEXT = {key: value for key, value in GEMMA4.items() if key != "torch_dtype"} | SIZES | {"pad_token_id": 0}
VISION = {
    **{"model_type": "gemma4_vision", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
    **{"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 16},
}
PUBLISHED = {
    "architectures": ["Gemma4ForConditionalGeneration"],
    "audio_config": None,
    "dtype": "bfloat16",
    "eos_token_id": [555],
    "image_token_id": 570,
    "model_type": "gemma4",
    "text_config": {**TEXT, "dtype": "bfloat16", "use_cache": True, "enable_moe_block": False, "num_experts": None},
    "tie_word_embeddings": True,
    "transformers_version": "5.5.0.dev0",
    "vision_config": VISION,
}
TOKENS = some_tokens(60, vocab=560)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("published")
    config = Gemma4Config(**{k: v for k, v in PUBLISHED.items() if k not in ("architectures", "dtype")})
    model = Gemma4ForConditionalGeneration(config).float()
    _scale_weights(model.model.language_model, 0)  # type: ignore[arg-type]
    tensors = {name: t.bfloat16() for name, t in model.state_dict().items() if name != "lm_head.weight"}
    assert any(name.startswith("model.vision_tower.") for name in tensors)
    assert "model.language_model.layers.0.layer_scalar" in tensors
    write_shards(path, tensors)
    (path / "config.json").write_text(json.dumps(PUBLISHED, indent=2), encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(ROOT / "teachers" / "tiny-r1" / name, path)
    return path


def logits(path: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.inference_mode():
        theirs: torch.Tensor = model(torch.tensor([TOKENS]), use_cache=False).logits[0]
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    return theirs


def load(path: Path) -> Engine:
    return Engine.load(path, engine_options(cache_tokens=256, kernels="reference"))


def test_the_engine_loads_it_as_it_is(published: Path) -> None:
    before = {file: file.read_bytes() for file in published.rglob("*") if file.is_file()}
    engine = load(published)
    assert engine.spec.family == "gemma4"
    error, report = relative_error(engine_logits(engine, TOKENS, decode_from=40), logits(published))
    assert error <= 1e-4, report
    assert {file: file.read_bytes() for file in published.rglob("*") if file.is_file()} == before


def test_cards_describe_its_language_model(published: Path, tmp_path: Path) -> None:
    made = model_cards.student_card(published)
    assert made.family == "gemma4" and made.context == 512
    assert made.architecture is not None and made.architecture.hidden_size == 64
    fields = {"name": "mine", "family": "gemma4", "weights": str(published), "parameters": made.parameters}
    fields |= {"context": 512, "license": "apache-2.0"}
    (tmp_path / "card.yaml").write_text(yaml.safe_dump(fields))
    assert catalog.resolve_weights("student", str(tmp_path / "card.yaml")) == published


def test_its_language_model_is_trained_and_stored_alone(published: Path, tmp_path: Path) -> None:
    settings = Train(dtype="float32")
    assert student.inspect(published, settings).vocabulary == 576
    model = student.load(published, settings, torch.float32)
    assert model.config.model_type == "gemma4_text"
    assert all(module.padding_idx is None for module in model.modules() if isinstance(module, torch.nn.Embedding))
    with torch.no_grad():
        for tensor in student.stored_tensors(model).values():
            tensor.mul_(1.0 + 2**-7)
    engine = load(published)
    engine.update(tensors_of(model))
    plain = student.empty(published, settings, torch.float32)
    student.write(tmp_path, plain, student.stored_tensors(model), Chat.load(published))
    saved = load(tmp_path)
    assert saved.spec.family == "gemma4_text"
    assert torch.equal(engine_logits(saved, TOKENS), engine_logits(engine, TOKENS))
    error, report = relative_error(engine_logits(saved, TOKENS), logits(tmp_path))
    assert error <= 1e-4, report


def test_shards_are_filled_from_the_published_names(published: Path) -> None:
    settings = Train(dtype="float32")
    model = student.empty(published, settings, torch.float32).to_empty(device="cpu")
    model.tie_weights()
    student.fill(model, published)
    whole = student.stored_tensors(student.load(published, settings, torch.float32))
    assert all(torch.equal(tensor, whole[name]) for name, tensor in student.stored_tensors(model).items())


def test_a_missing_buffer_is_named(published: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from distill.errors import UserError

    shutil.copytree(published, tmp_path / "model")
    tensors = {name: t for file in published.glob("*.safetensors") for name, t in load_file(file).items()}
    del tensors["model.language_model.layers.3.layer_scalar"]
    write_shards(tmp_path / "model", tensors)
    with pytest.raises(UserError, match="are missing: model.layers.3.layer_scalar"):
        student.inspect(tmp_path / "model", Train())


def test_a_longer_context_keeps_the_layout(published: Path) -> None:
    from distill.models import Model

    with student.as_trained(Model("base", published), Train(max_position_embeddings=1024)) as base:
        engine = load(base.directory)
    assert engine.spec.family == "gemma4" and engine.spec.max_context == 1024
