"""The table of families: a family is one file and one line, and nothing else in distill names one."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType

import pytest
import torch
from engine_checks import engine_logits, engine_options, some_tokens
from random_models import FAMILIES as IN_TRANSFORMERS
from random_models import LLAMA, Checkpoint, build, write
from transformers import MistralConfig, MistralForCausalLM

from distill.catalog import load_teacher
from distill.engine import Engine, families
from distill.engine.families import FAMILIES, read_spec
from distill.engine.families.family import Family

ROOT = Path(__file__).resolve().parents[2]

MISTRAL = """
from distill.engine.families.dense import read_dense
from distill.engine.families.family import Family


def read(config):
    config.only("sliding_window", ())
    return read_dense(config, "mistral")


FAMILY = Family("mistral", read)
"""
RENAMED = """
from dataclasses import replace

from distill.engine.families.dense import read_dense
from distill.engine.families.family import Family
from distill.engine.families.names import GqaNames, MlpNames, WeightNames

NAMES = WeightNames(
    embed="tok.weight", norm="last.weight", head="out.weight", layer="blocks.{}.", attention_norm="n1.weight",
    mlp_norm="n2.weight", dense="ff.", gqa=GqaNames("a.wq", "a.wk", "a.wv", "a.wo"), mlp=MlpNames("w1", "w3", "w2"),
)
FAMILY = Family("renamed", lambda config: read_dense(config, "renamed"), NAMES)
"""
TO_RENAMED = {
    "model.embed_tokens": "tok", "model.norm": "last", "lm_head": "out", "model.layers": "blocks",
    "input_layernorm": "n1", "post_attention_layernorm": "n2", "mlp.gate_proj": "ff.w1", "mlp.up_proj": "ff.w3",
    "mlp.down_proj": "ff.w2", "self_attn.q_proj": "a.wq", "self_attn.k_proj": "a.wk", "self_attn.v_proj": "a.wv",
    "self_attn.o_proj": "a.wo",
}  # fmt: skip


CARD = "name: x\nfamily: {}\nweights: .\nparameters: 1\nactive_parameters: 1\ncontext: 9\nlicense: mit\n"


@pytest.fixture
def add_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Family]:
    """Write a family's file, and add its line to the table."""

    def add(name: str, source: str) -> Family:
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        module_spec = importlib.util.spec_from_file_location(name, file)
        assert module_spec is not None and module_spec.loader is not None
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        table = MappingProxyType({**FAMILIES, name: module.FAMILY})
        for user in ("families", "reader", "loading"):
            monkeypatch.setattr(f"distill.engine.{user}.FAMILIES", table)
        return module.FAMILY

    return add


GENERATES = """
import sys
from distill.catalog import load_teacher, resolve_weights
from distill.engine import Engine, EngineOptions, Request, SamplingParams

card, prompt = sys.argv[1], tuple(map(int, sys.argv[2].split()))
assert load_teacher(card).family == "mistral"
engine = Engine.load(resolve_weights("teacher", card), EngineOptions(dtype="float32", cache_tokens=256))
sampling = SamplingParams(temperature=0, max_new_tokens=8)
(done,) = engine.generate([Request("a", prompt, sampling, seed=0, prompt_key=0, samples=(0,))])
print(*done.token_ids)
"""


def test_a_family_is_one_file_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral, which distill does not ship, in a copy of distill: its card is read, it answers as in transformers."""
    config = {**LLAMA, "model_type": "mistral", "sliding_window": None, "head_dim": 24}
    monkeypatch.setitem(IN_TRANSFORMERS, "mistral", (MistralConfig, MistralForCausalLM))
    ckpt = build(tmp_path / "model", config)
    with pytest.raises(ValueError, match="model_type is 'mistral'; supported are"):
        read_spec(ckpt.path)
    shutil.copytree(ROOT / "distill", tmp_path / "distill", ignore=shutil.ignore_patterns("__pycache__"))
    table = tmp_path / "distill" / "engine" / "families" / "__init__.py"
    (table.parent / "mistral.py").write_text(MISTRAL)
    line = '            "llama",\n'
    assert table.read_text().count(line) == 1
    table.write_text(table.read_text().replace(line, line + '            "mistral",\n'))
    card, prompt = tmp_path / "card.yaml", some_tokens(20)
    card.write_text(CARD.format("mistral").replace("weights: .", "weights: model"))

    def answer() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", GENERATES, str(card), " ".join(map(str, prompt))]
        environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    tokens = list(prompt)
    for _ in range(8):
        tokens.append(int(ckpt.logits(tokens)[-1].argmax()))
    done = answer()
    assert done.stdout.split() == [str(token) for token in tokens[20:]], done.stderr
    (ckpt.path / "config.json").write_text(json.dumps({**config, "sliding_window": 4096}))
    assert "'sliding_window' is 4096" in answer().stderr


def test_a_family_with_other_names(
    add_family: Callable[[str, str], Family], checkpoint: Callable[[str], Checkpoint], tmp_path: Path
) -> None:
    """The same tensors under other names are the same model, bit for bit."""
    add_family("renamed", RENAMED)
    source = checkpoint("llama-gqa")
    (tmp_path / "model").mkdir()
    pattern = re.compile("|".join(map(re.escape, sorted(TO_RENAMED, key=len, reverse=True))))
    tensors = {pattern.sub(lambda match: TO_RENAMED[match[0]], name): t for name, t in source.tensors.items()}
    write(tmp_path / "model", tensors)
    (tmp_path / "model" / "config.json").write_text(json.dumps({**LLAMA, "model_type": "renamed"}))
    ours, theirs = (
        engine_logits(Engine.load(path, engine_options(cache_tokens=256)), some_tokens(30))
        for path in (tmp_path / "model", source.path)
    )
    assert torch.equal(ours, theirs)


def test_the_table_is_the_only_list() -> None:
    """No other file of distill names a family, and no other file lists them."""
    names = re.compile(rf'["\']({"|".join(FAMILIES)})["\']')
    named = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "distill").rglob("*.py")
        if "families" not in path.parts and names.search(path.read_text(encoding="utf-8"))
    }
    # vLLM and SGLang have reasoning parsers of the same names, GGUF files splits of text
    assert not named - {"distill/backends/serving.py", "distill/gguf_tokenizer.py"}


def test_names_are_complete() -> None:
    """Every name is a text: a typing error in a family's table would otherwise be met when its checkpoint is loaded."""

    def walk(part: object) -> None:
        for field in fields(part):  # type: ignore[arg-type]  # of a dataclass
            value = getattr(part, field.name)
            if is_dataclass(value):
                walk(value)
            else:
                assert isinstance(value, str | tuple), field.name

    for family in FAMILIES.values():
        walk(family.names)
        assert family.names.layer.count("{}") == family.names.moe.expert.count("{}") == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_cards_take_every_family_and_no_other(name: str, tmp_path: Path) -> None:
    card = tmp_path / "card.yaml"
    card.write_text(CARD.format(name))
    assert load_teacher(str(card)).family == name
    card.write_text(CARD.format("unheard_of"))
    with pytest.raises(Exception, match="unknown family 'unheard_of'; expected one of deepseek_v2"):
        load_teacher(str(card))
    assert families.FAMILIES[name].name == name
