"""A directory laid out like the published repositories of R1 and V3.1, only with tiny sizes, works as it is: a card
that points at it is all a user writes. The numbers are those of transformers on the dequantised weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from engine_checks import engine_logits, relative_error
from random_models import V3_YARN, build, dequantise
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from distill import backends, catalog
from distill.backends import Backend, Completed, Job, SamplingParams
from distill.backends.local import LocalBackend
from distill.errors import UserError
from distill.eval.models import models_of
from distill.generate import STAGE
from distill.models import Model
from distill.prompts import Prompt
from distill.recipe import LocalEngine
from distill.run import Run

TINY = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SHARDS = 4
LAYERS = 5  # three dense, as published, and two of experts; the layer that drafts comes after them
FLOAT32 = LocalEngine(dtype="float32")
GREEDY = SamplingParams(temperature=0, top_p=1, max_new_tokens=12)
QUESTION = Prompt.from_question("What is 12 + 30 - 7?\n  Think, please.", "35")

# Every key of the published file, in its order and spelling; what is smaller than published stands below.
R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModel": "modeling_deepseek.DeepseekV3Model",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
    "aux_loss_alpha": 0.001,
    "bos_token_id": 554,
    "eos_token_id": 555,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 192,
    "initializer_range": 0.02,
    "intermediate_size": 320,
    "kv_lora_rank": 128,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 48,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts_per_tok": 8,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 4,
    "num_nextn_predict_layers": 1,
    "pretraining_tp": 1,
    "q_lora_rank": 160,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "quantization_config": {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
    },
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.46.3",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": 576,
}
V3_1 = {**R1, "quantization_config": {**R1["quantization_config"], "scale_fmt": "ue8m0"}}
PREFILL = "{{ '<｜Assistant｜><think>\\n' }}"  # how the tiny teacher's template, and R1's, opens an answer
PREFILL_V3_1 = "{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}"


@dataclass(frozen=True)
class Published:
    """A model directory under its published name, and its weights in float32 without the layer that drafts."""

    path: Path
    plain: dict[str, Tensor]

    def card(self, file: Path, **changes: Any) -> Path:
        """A teacher card for it, at `file`."""
        fields = {"name": "mine", "family": "deepseek_v3", "weights": str(self.path), "parameters": 0.001}
        fields |= {"active_parameters": 0.001, "context": R1["max_position_embeddings"], "license": "mit"} | changes
        file.write_text(yaml.safe_dump(fields), encoding="utf-8")
        return file

    def reference(self, directory: Path) -> DeepseekV3ForCausalLM:
        """transformers' model, from its own reading of the dequantised weights."""
        config = {key: value for key, value in R1.items() if key not in ("quantization_config", "auto_map")}
        config |= {"torch_dtype": "float32", "num_nextn_predict_layers": 0}
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
        save_file(self.plain, directory / "model.safetensors", metadata={"format": "pt"})
        model, info = DeepseekV3ForCausalLM.from_pretrained(directory, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        return model.eval()


def publish(path: Path, config: dict[str, Any], template: str, scales: torch.dtype = torch.float32) -> Published:
    """Write a random model as DeepSeek publishes them. Scales are powers of two where the config says `ue8m0`."""
    build(path, {key: config[key] for key in V3_YARN} | {"draft_layer": True}, fp8=True)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            power_of_two = config["quantization_config"].get("scale_fmt") == "ue8m0"
            tensors[name] = (tensor.log2().ceil().exp2() if power_of_two else tensor).to(scales)
        elif tensor.dtype == torch.float32 and not name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.bfloat16()
    write_shards(path, tensors)
    write_rest(path, config, template)
    plain = {}
    for name, tensor in tensors.items():
        if not name.startswith(f"model.layers.{LAYERS}.") and not name.endswith("_scale_inv"):
            scale = tensors.get(name + "_scale_inv")
            plain[name] = tensor.float() if scale is None else dequantise(tensor, scale)
    return Published(path, plain)


def write_shards(path: Path, tensors: dict[str, Tensor]) -> None:
    names, weight_map = list(tensors), {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:06}.safetensors"  # the published names have five digits, and six
        part = names[len(names) * shard // SHARDS : len(names) * (shard + 1) // SHARDS]
        save_file({name: tensors[name] for name in part}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_rest(path: Path, config: dict[str, Any], template: str) -> None:
    """All that is not weights. The code would stop a process that runs it."""

    def special(token: str) -> dict[str, Any]:
        flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
        return {"__type": "AddedToken", "content": token, **flags}

    tokenizer = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": special(BOS),
        "clean_up_tokenization_spaces": False,
        "eos_token": special(EOS),
        "legacy": True,
        "model_max_length": 16384,
        "pad_token": special(EOS),
        "sp_model_kwargs": {},
        "unk_token": None,
        "tokenizer_class": "LlamaTokenizerFast",
        "chat_template": template,
    }
    generation = {"_from_model_config": True, "bos_token_id": 554, "eos_token_id": 555, "do_sample": True}
    generation |= {"temperature": 0.6, "top_p": 0.95, "transformers_version": "4.39.3"}
    for file, content in {
        "config.json": json.dumps(config, indent=2),
        "generation_config.json": json.dumps(generation, indent=2),
        "tokenizer_config.json": json.dumps(tokenizer, indent=2, ensure_ascii=False),
        "tokenizer.json": (TINY / "tokenizer.json").read_text(encoding="utf-8"),
        "configuration_deepseek.py": "raise SystemExit('a model directory is data; its code must not be executed')\n",
        "modeling_deepseek.py": "raise SystemExit('a model directory is data; its code must not be executed')\n",
        "README.md": "---\nlicense: mit\nlibrary_name: transformers\n---\n# A model\n",
        "LICENSE": "MIT License\n",
        ".gitattributes": "*.safetensors filter=lfs diff=lfs merge=lfs -text\n",
        "figures/benchmark.jpg": "not a picture",
    }.items():
        (path / file).parent.mkdir(exist_ok=True)
        (path / file).write_text(content, encoding="utf-8")


def template(opening: str = PREFILL) -> str:
    text = (TINY / "chat_template.jinja").read_text(encoding="utf-8")
    assert PREFILL in text
    return text.replace(PREFILL, opening)


@pytest.fixture(scope="module", params=["R1", "V3.1", "V3.1 scales of a byte"])
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Published:
    path = tmp_path_factory.mktemp("hub") / f"DeepSeek-{request.param.split()[0]}"
    if request.param == "R1":
        return publish(path, R1, template())
    scales = torch.float32 if request.param == "V3.1" else torch.float8_e8m0fnu
    return publish(path, V3_1, template(PREFILL_V3_1), scales)


def complete(backend: Backend) -> Completed:
    (done,) = backend.complete([Job(QUESTION, (0,))], GREEDY, seed=0)
    return done


def test_a_card_is_all_it_takes(published: Published, tmp_path: Path) -> None:
    thinking = None if published.path.name == "DeepSeek-R1" else True
    card = str(published.card(tmp_path / "mine.yaml", thinking=thinking))
    before = {file: file.read_bytes() for file in published.path.rglob("*") if file.is_file()}
    assert catalog.check("teacher", card) == []
    assert catalog.resolve_weights("teacher", card) == published.path
    backend = LocalBackend.load(Model("m", published.path, thinking=thinking), FLOAT32)
    assert backend.engine.max_context == 163840

    done = complete(backend)
    opened = "<think>\n" if thinking is None else "<think>"
    asked = f"{BOS}<｜User｜>{QUESTION.messages[0]['content']}<｜Assistant｜>{opened}"
    raw = Tokenizer.from_file(str(TINY / "tokenizer.json"))  # byte-level, whatever class is named beside it
    assert list(done.prompt_token_ids) == raw.encode(asked, add_special_tokens=False).ids
    completion = raw.decode(list(done.completion_token_ids), skip_special_tokens=False)
    assert done.text == opened + completion.removesuffix(EOS)

    model = published.reference(tmp_path)
    tokens = [*done.prompt_token_ids, *done.completion_token_ids]
    with torch.inference_mode():
        theirs = model(torch.tensor([tokens])).logits[0]
    assert theirs.std(-1).min() >= 1, "the logits must spread, or the comparison proves nothing"
    error, report = relative_error(engine_logits(backend.engine, tokens), theirs)
    assert error <= 1e-4, report
    at = len(done.prompt_token_ids) - 1
    assert theirs[at:-1].argmax(-1).tolist() == list(done.completion_token_ids)
    assert {file: file.read_bytes() for file in published.path.rglob("*") if file.is_file()} == before


def test_the_published_draft_layer_drafts_and_the_text_stays(published: Published) -> None:
    plain, drafting = (
        LocalBackend.load(Model("m", published.path), FLOAT32.model_copy(update={"num_speculative_tokens": n}))
        for n in (0, 2)
    )
    assert complete(drafting) == complete(plain)
    assert drafting.usage.drafts is not None and drafting.usage.drafts[0] > 0


def test_the_two_modes_are_two_teachers(tmp_path: Path) -> None:
    published = publish(tmp_path / "DeepSeek-V3.1", V3_1, template(PREFILL_V3_1))
    card = tmp_path / "mine.yaml"
    settings = [f"teacher={card}", "prompts.0.limit=1", "generate.sampling.max_new_tokens=4", "eval.models=[teacher]"]
    texts = {}
    for thinking in (True, False):
        published.card(card, thinking=thinking)
        recipe = catalog.load_recipe("tiny", settings)
        with Run(tmp_path / f"run-{thinking}", recipe) as run:
            STAGE.perform(run)
            (teacher,) = models_of(run)
        with backends.open(teacher, recipe.engine, 1) as backend:  # as it is scored
            assert backend.identity["thinking"] is teacher.identity["thinking"] is thinking
            texts[thinking] = complete(backend).text
    assert texts[True].startswith("<think>") and not texts[False].startswith(("<think>", "</think>"))
    with Run(tmp_path / "run-True", recipe) as run, pytest.raises(UserError, match=r"teacher\.thinking: true → false"):
        STAGE.perform(run)


def test_a_mode_that_the_template_lacks_is_refused_before_the_weights_are_read(tmp_path: Path) -> None:
    path = publish(tmp_path / "DeepSeek-R1", R1, template()).path
    for shard in path.glob("*.safetensors"):
        shard.write_bytes(b"")
    with pytest.raises(UserError, match="has one mode only"):
        LocalBackend.load(Model("m", path, thinking=False), FLOAT32)
