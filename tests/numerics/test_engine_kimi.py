"""Directories laid out like the published repositories of Kimi K2-Thinking and K2.5, only with tiny sizes, load as they
are: index, shards, experts in INT4, a tiktoken.model and code that must not run, and in K2.5 a vision model that is not
read. The numbers are those of transformers' DeepSeek-V3 on the decoded weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_checks import engine_logits, engine_options, relative_error, some_tokens
from four_bit_models import COMPRESSED, build_four_bit
from kimi_support import WORDS, publish, vocabulary
from random_models import KIMI_K2, Checkpoint
from safetensors.torch import load_file
from test_engine_published import write_shards

from distill import catalog
from distill.backends import Job, SamplingParams
from distill.backends.local import LocalBackend
from distill.engine import Engine
from distill.engine.families import read_spec, spec_of
from distill.errors import UserError
from distill.model_cards import doubts, refuse_another_model, teacher_card
from distill.models import Model
from distill.prompts import Prompt
from distill.recipe import LocalEngine, TeacherCard

TOKENS = vocabulary(WORDS, 64)  # 320, and 256 control tokens
SIZES = {"vocab_size": 576, "bos_token_id": 320, "eos_token_id": 322, "pad_token_id": 575}
K2_THINKING: dict[str, Any] = {
    **KIMI_K2,
    **SIZES,
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "dtype": "bfloat16",
    "ep_size": 1,
    "initializer_range": 0.02,
    "max_position_embeddings": 262144,
    "moe_intermediate_size": 32,
    "n_routed_experts": 16,
    "pretraining_tp": 1,
    "quantization_config": COMPRESSED,
    "rms_norm_eps": 1e-05,
    "seq_aux": True,
    "transformers_version": "4.57.1",
    "use_cache": True,
}
del K2_THINKING["torch_dtype"]
K2_5: dict[str, Any] = {
    "architectures": ["KimiK25ForConditionalGeneration"],
    "auto_map": {"AutoConfig": "configuration_kimi_k25.KimiK25Config"},
    "bos_token_id": 320,
    "dtype": "bfloat16",
    "eos_token_id": 322,
    "ignore_index": -100,
    "media_placeholder_token_id": 341,
    "model_type": "kimi_k25",
    "pad_token_id": 575,
    "text_config": K2_THINKING,
    "tie_word_embeddings": False,
    "use_unified_vision_chunk": True,
    "vision_config": {"model_type": "kimi_k25", "vt_hidden_size": 1152},
}
CONFIGS = {"kimi_k2": K2_THINKING, "kimi_k25": K2_5}


def build_kimi(path: Path, family: str) -> Checkpoint:
    unread = ("auto_map", "quantization_config", "transformers_version", "architectures", "dtype")
    known = {key: value for key, value in K2_THINKING.items() if key not in unread}
    made = build_four_bit(path, {**known, "model_type": family})
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    if family == "kimi_k25":
        tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
        for name in ("vision_tower.patch_embed.proj.weight", "mm_projector.proj.0.weight"):
            tensors[name] = torch.zeros(4, 4).bfloat16()
    write_shards(path, tensors)
    publish(path, TOKENS, family)
    for name in ("modeling_deepseek.py", "configuration_deepseek.py", "configuration_kimi_k25.py"):
        (path / name).write_text("raise SystemExit('a model directory is data; its code must not be executed')\n")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": 322, "max_length": 262144}))
    (path / "config.json").write_text(json.dumps(CONFIGS[family], indent=2))
    return made


@pytest.fixture(scope="module", params=CONFIGS)
def kimi(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Checkpoint]:
    return request.param, build_kimi(tmp_path_factory.mktemp(request.param) / "model", request.param)


def test_a_published_directory_loads_as_it_is(kimi: tuple[str, Checkpoint], tmp_path: Path) -> None:
    family, made = kimi
    before = {file: file.read_bytes() for file in made.path.rglob("*") if file.is_file()}
    card = tmp_path / "card.yaml"
    fields = {"name": "mine", "family": family, "weights": str(made.path), "parameters": 0.001, "context": 1024}
    card.write_text(yaml.safe_dump(fields | {"license": "mit", "active_parameters": 0.001}))
    assert catalog.resolve_weights("teacher", str(card)) == made.path
    backend = LocalBackend.load(Model("m", made.path), LocalEngine(dtype="float32"))
    assert backend.engine.max_context == 262144
    greedy = SamplingParams(temperature=0, top_p=1, max_new_tokens=12)
    (done,) = backend.complete([Job(Prompt.from_question("What is 12 + 30?", "42"), (0,))], greedy, seed=0)
    assert done.text.startswith("<think>")

    tokens = [*done.prompt_token_ids, *done.completion_token_ids]
    theirs = made.logits(tokens)
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    error, report = relative_error(engine_logits(backend.engine, tokens), theirs)
    assert error <= 1e-4, report
    at = len(done.prompt_token_ids) - 1
    assert theirs[at:-1].argmax(-1).tolist() == list(done.completion_token_ids)
    assert {file: file.read_bytes() for file in made.path.rglob("*") if file.is_file()} == before


def test_a_card_is_made_of_the_directory(kimi: tuple[str, Checkpoint]) -> None:
    family, made = kimi
    card = teacher_card(made.path)
    numbers = sum(tensor.numel() for tensor in made.tensors.values())
    assert (card.family, card.context) == (family, 262144)
    assert card.parameters == pytest.approx(numbers / 1e9, rel=1e-3), "codes are counted, not their words"
    assert card.active_parameters is not None and card.active_parameters < card.parameters
    config = json.loads((made.path / "config.json").read_text())
    assert doubts(card, made.path, config) == []
    assert len(doubts(card.model_copy(update={"context": 10**6}), made.path, config)) == 1
    other = TeacherCard.model_validate(card.model_dump() | {"family": "deepseek_v3"})
    with pytest.raises(UserError, match=f"family is deepseek_v3, and {family} there"):
        refuse_another_model(other, made.path / "card.yaml", made.path)


def test_each_feature_is_computed(kimi: tuple[str, Checkpoint], tmp_path: Path) -> None:
    """Experts' codes with other scales, another scale of the router, another YaRN: each moves the logits."""
    family, made = kimi
    tokens = some_tokens(30)
    spec = read_spec(made.path)
    assert spec.family == family and spec.moe is not None and spec.moe.routed_scale == 2.827
    engine = Engine.load(made.path, engine_options(cache_tokens=512))
    error, report = relative_error(engine_logits(engine, tokens), made.logits(tokens))
    assert error <= 1e-4, report
    for key, value in (("routed_scaling_factor", 1.0), ("rope_scaling", None), ("norm_topk_prob", False)):
        path = tmp_path / key
        path.mkdir()
        config = json.loads((made.path / "config.json").read_text())
        (config["text_config"] if family == "kimi_k25" else config)[key] = value
        (path / "config.json").write_text(json.dumps(config))
        for file in made.path.glob("model*"):
            (path / file.name).symlink_to(file)
        changed = engine_logits(Engine.load(path, engine_options(cache_tokens=512)), tokens)
        assert relative_error(changed, made.logits(tokens))[0] > 1e-3, f"{key} is not computed"


def test_configs_that_are_refused() -> None:
    assert spec_of(K2_5).max_context == 262144
    with pytest.raises(ValueError, match="'text_config' is missing"):
        spec_of({**K2_5, "text_config": None})
    with pytest.raises(ValueError, match=r"text_config: 'model_type' is 'kimi_linear'; only"):
        spec_of({**K2_5, "text_config": {**K2_THINKING, "model_type": "kimi_linear"}})
    outside = {key: value for key, value in K2_THINKING.items() if key != "quantization_config"}
    with pytest.raises(ValueError, match="quantised by 'gptq'"):
        spec_of({**K2_5, "text_config": outside, "quantization_config": {"quant_method": "gptq"}})
    with pytest.raises(ValueError, match=r"text_config: quantization_config.*'num_bits' is 8"):
        weights = {**COMPRESSED["config_groups"]["group_0"]["weights"], "num_bits": 8}
        quantised = {**COMPRESSED, "config_groups": {"group_0": {"weights": weights}}}
        spec_of({**K2_5, "text_config": {**K2_THINKING, "quantization_config": quantised}})
