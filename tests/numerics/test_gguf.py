"""GGUF files against what transformers makes of the same numbers: every type and family, split files, RoPE rules, and
what is refused, each in one line and with nothing written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_checks import engine_logits, engine_options, some_tokens
from gguf_models import CONFIGS, TEMPLATE, Type, write
from safetensors.torch import load_file

from distill import catalog, gguf_files, model_files
from distill.chat import Chat
from distill.engine import Engine, Request, SamplingParams
from distill.errors import UserError

TYPES = [Type[name] for name in gguf_files.TYPES]
TOKENS = some_tokens(40, vocab=250)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "distill" / "gguf"


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


def greedy(directory: Path) -> list[int]:
    engine = Engine.load(directory, engine_options(cache_tokens=256))
    sampling = SamplingParams(temperature=0, max_new_tokens=12)
    (done,) = engine.generate([Request("a", tuple(TOKENS), sampling, seed=0, prompt_key=0, samples=(0,))])
    return list(done.token_ids)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_a_file_is_the_model_that_transformers_has_of_its_numbers(family: str, kind: Type, tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", family, kind)
    directory = gguf_files.directory_of(written.path)
    read = tensors(directory)
    assert read.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert torch.equal(read[name], tensor), name
    model = written.model()
    with torch.no_grad():
        theirs = model(torch.tensor([TOKENS])).logits[0]
        engine = Engine.load(directory, engine_options(cache_tokens=256))
        assert theirs.std() > 0.1, "the logits must spread, or the comparison proves nothing"
        assert (engine_logits(engine, TOKENS) - theirs).abs().max() < 1e-3
        chosen = list(TOKENS)
        for _ in range(12):
            chosen.append(int(model(torch.tensor([chosen])).logits[0, -1].argmax()))
    published = tmp_path / "published"
    model.to(torch.bfloat16).save_pretrained(published)
    assert greedy(directory) == greedy(published) == chosen[len(TOKENS) :]


def test_a_file_is_converted_once_and_another_file_is_another_directory(tmp_path: Path, cache: Path) -> None:
    first = write(tmp_path / "model.gguf", "qwen2", Type.Q8_0).path
    directory = gguf_files.directory_of(first)
    made = (directory / "config.json").stat().st_mtime_ns
    assert gguf_files.directory_of(first) == directory and directory.name == "model"
    assert (directory / "config.json").stat().st_mtime_ns == made
    assert [each.name for each in cache.rglob("*") if each.name.startswith(".")] == []
    second = write(tmp_path / "model.gguf", "qwen2", Type.Q4_0).path
    assert gguf_files.directory_of(second) != directory


def test_large_models_are_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_files, "SHARD_BYTES", 300_000)
    monkeypatch.setattr(gguf_files, "PIECE", 1000)
    written = write(tmp_path / "model.gguf", "llama", Type.Q6_K)
    directory = gguf_files.directory_of(written.path)
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 3
    assert model_files.first_problem(directory) is None
    assert all(torch.equal(tensor, written.tensors[name]) for name, tensor in tensors(directory).items())
    Engine.load(directory, engine_options(cache_tokens=256))


def test_tokenizer_template_ends_and_licence_come_along(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")  # of another model, beside the file
    path = write(tmp_path / "mine.gguf", "qwen2", edit={"tokenizer.ggml.eot_token_id": 259}).path
    directory = gguf_files.directory_of(path)
    chat = Chat.load(directory)
    assert chat.template == TEMPLATE and set(chat.stop_token_ids) == {258, 259}
    assert chat.decode(chat.tokenizer("a b 12", add_special_tokens=False)["input_ids"]) == "a b 12"
    card = catalog.load_student(str(path))
    assert (card.name, card.license, card.family, card.context) == ("mine", "mit", "qwen2", 512)
    assert catalog.load_teacher(str(path)).weights == "."
    assert model_files.model_directory(str(path)) == directory


DIGITS = [
    {"type": "Digits", "individual_digits": True},
    {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
]


@pytest.mark.parametrize("split", ["smollm", "starcoder", "refact", "command-r"])
def test_a_split_of_single_digits_is_the_published_one(split: str, tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", edit={"tokenizer.ggml.pre": split}).path
    backend = Chat.load(gguf_files.directory_of(path)).tokenizer.backend_tokenizer
    assert json.loads(backend.to_str())["pre_tokenizer"] == {"type": "Sequence", "pretokenizers": DIGITS}
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str("in 1989")] == ["in", "Ġ", "1", "9", "8", "9"]


def test_a_split_in_whose_place_transformers_puts_that_of_the_family_is_refused(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen2", edit={"tokenizer.ggml.pre": "smollm"}).path
    with pytest.raises(UserError, match="splits text by another rule than the file"):
        gguf_files.directory_of(path)
    assert [each for each in cache.rglob("*") if each.is_file()] == []


def test_a_split_that_transformers_takes_for_gpt_2_s_is_refused_by_name(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "model.gguf", "llama", edit={"tokenizer.ggml.pre": "deepseek-coder"}).path
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre is 'deepseek-coder', a split of text that is not read"):
        gguf_files.directory_of(path)
    assert [each for each in cache.rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_control_tokens_of_any_letters_keep_their_ids(family: str, tmp_path: Path) -> None:
    controls = ("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>")
    edit = {
        "tokenizer.ggml.pre": "deepseek-r1-qwen",
        "tokenizer.ggml.eos_token_id": 261,
        "tokenizer.ggml.bos_token_id": 264,
        "tokenizer.ggml.padding_token_id": 261,
        "tokenizer.chat_template": "{{ bos_token }}{% for m in messages %}<｜User｜>{{ m.content }}{% endfor %}",
    }
    chat = Chat.load(gguf_files.directory_of(write(tmp_path / "m.gguf", family, edit=edit, controls=controls).path))
    tokenizer = chat.tokenizer
    assert len(tokenizer) == 265
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, chat.stop_token_ids) == (264, 261, (261,))
    for number, token in enumerate(controls, 261):
        assert tokenizer.encode(token, add_special_tokens=False) == [number]
    ids = chat.prompt_ids([{"role": "user", "content": "hé"}])
    assert ids[:2] == [264, 262] and tokenizer.decode(ids[2:]) == "hé"


def test_a_control_token_that_is_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen2", controls=("<｜User｜>", "<｜User｜>")).path
    with pytest.raises(UserError, match=r"its tokenizer has 265 tokens, and 26\d after conversion"):
        gguf_files.directory_of(path)


def test_a_card_names_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mine.gguf", "qwen3", Type.Q8_0).path
    card = tmp_path / "card.yaml"
    card.write_text("{name: c, family: qwen3, weights: mine.gguf, parameters: 0.001, context: 512, license: mit}")
    assert catalog.resolve_weights("student", str(card)) == gguf_files.directory_of(path)
    assert catalog.check("student", str(card)) == []
    card.write_text("{name: c, family: llama, weights: mine.gguf, parameters: 0.001, context: 512, license: mit}")
    with pytest.raises(UserError, match=r"family is llama, and qwen3 there"):
        catalog.check("student", str(card))


@pytest.mark.parametrize("named", [1, 3])
def test_split_files_are_one_model(named: int, tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", "llama", Type.Q8_0, parts=3)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    directory = gguf_files.directory_of(parts[named - 1])
    assert directory.name == "model"
    assert all(torch.equal(tensor, written.tensors[name]) for name, tensor in tensors(directory).items())
    (second := parts[1]).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-00003\.gguf is missing; download it \(1 of 3 parts"):
        gguf_files.directory_of(parts[named - 1])
    second.write_bytes(parts[2].read_bytes())
    with pytest.raises(UserError, match=r"00002-of-00003\.gguf: part 3 of 3 by its content, 2 of 3 by its name"):
        gguf_files.directory_of(parts[0])


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_tied_where_it_is_not_stored_or_stored_twice(tied: bool, tmp_path: Path) -> None:
    written = write(tmp_path / "model.gguf", "qwen2", Type.Q8_0, tied=tied)
    config = model_files.read_object(gguf_files.directory_of(written.path) / "config.json")
    assert config["tie_word_embeddings"] is tied


LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def factors(rule: dict[str, Any]) -> np.ndarray:
    """As llama.cpp's converter computes them, by wavelengths (of `modeling_rope_utils`, the other way around)."""
    values = []
    for i in range(32):
        wave = 2 * math.pi * rule["rope_theta"] ** (2 * i / 64)
        low, high = (rule["original_max_position_embeddings"] / rule[f"{end}_freq_factor"] for end in ("low", "high"))
        smooth = (rule["original_max_position_embeddings"] / wave - 1) / 3
        middle = 1 / ((1 - smooth) / rule["factor"] + smooth)
        values.append(1.0 if wave < high else rule["factor"] if wave > low else middle)
    return np.array(values, np.float32)


@pytest.mark.parametrize(
    ("rope", "edit", "frequencies"),
    [
        (LLAMA3, {}, factors(LLAMA3)),
        ({"rope_type": "default", "rope_theta": 5e5}, {}, np.ones(32, np.float32)),
        (
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            None,
        ),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
            },
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
            },
            None,
        ),
        (
            {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
            {"llama.rope.scaling.factor": 4.0},  # llama.cpp's default is linear
            None,
        ),
        (
            {
                "rope_type": "yarn",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "attention_factor": 1.5 * 1.1386294361,  # of 0.1 ln 4 + 1
            },
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 128,
                "llama.rope.scaling.attn_factor": 1.5,
            },
            None,
        ),
    ],
    ids=["llama3", "ones", "linear", "yarn", "a factor alone", "yarn with a magnitude"],
)
def test_rope_rules_are_those_of_transformers(
    rope: dict[str, Any], edit: dict[str, Any], frequencies: np.ndarray | None, tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    written = write(path, "llama", edit=edit, frequencies=frequencies, rope_parameters=rope)
    engine = Engine.load(gguf_files.directory_of(path), engine_options(cache_tokens=512))
    long = some_tokens(200, vocab=250)
    with torch.no_grad():
        theirs = written.model()(torch.tensor([long])).logits[0]
    assert (engine_logits(engine, long) - theirs).abs().max() < 1e-3


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"edit": {"general.architecture": "gemma2"}}, r"family 'gemma2' are not read; supported are llama, qwen2, qwen3"),
    ({"kind": Type.TQ1_0}, r"is stored as TQ1_0, which is not read; supported are F32, F16, BF16, Q8_0"),
    ({"edit": {"llama.attention.sliding_window": 128}}, r"llama\.attention\.sliding_window is 128, which is not read"),
    ({"edit": {"llama.expert_count": 8}}, r"a mixture of experts \(family llama\)"),
    ({"edit": {"llama.rope.dimension_count": 32}}, r"llama\.rope\.dimension_count is 32, and a head has 64"),
    ({"edit": {"llama.rope.scaling.type": "longrope"}}, r"RoPE scaling 'longrope' is not read"),
    ({"edit": {"llama.rope.scaling.attn_factor": 2.0}}, r"rope\.scaling\.attn_factor is 2 without YaRN, which is not"),
    ({"edit": {"llama.block_count": "two"}}, r"llama\.block_count is two, not a whole number"),
    ({"edit": {"llama.block_count": 3}}, r"tensor blk\.2\.attn_norm\.weight is missing; download the file again"),
    ({"edit": {"llama.block_count": 1}}, r"tensor blk\.1\.\S+ has no place in a model of family llama"),
    (
        {"edit": {"llama.feed_forward_length": 512}},
        r"ffn_gate\.weight has shape \[256, 256\], its metadata makes it \[512",
    ),
    ({"edit": {"llama.attention.head_count": 0}}, r"'num_attention_heads' is 0; it must be from 1"),
    ({"without": ("blk.1.ffn_up.weight",)}, r"tensor blk\.1\.ffn_up\.weight is missing; download"),
    ({"without": ("token_embd.weight",)}, r"tensor token_embd\.weight is missing; download"),
    ({"frequencies": np.full(32, 3, np.float32)}, r"rope_freqs\.weight is of another rule than Llama 3's"),
]


@pytest.mark.parametrize(("how", "message"), REFUSED, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_not_read_is_named_and_nothing_is_written(
    how: dict[str, Any], message: str, tmp_path: Path, cache: Path
) -> None:
    path = write(tmp_path / "model.gguf", "llama", **how).path
    with pytest.raises(UserError, match=message) as caught:
        gguf_files.directory_of(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    assert [each for each in cache.rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("keep", [4, 20, 200, 3000, -100])
def test_a_file_that_was_cut_off_is_one_line(keep: int, tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path / "model.gguf", "qwen2", Type.Q8_0).path
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"not a complete GGUF file \(.+\); download it again") as caught:
        gguf_files.directory_of(path)
    assert "\n" not in str(caught.value)
    assert [each for each in cache.rglob("*") if each.is_file()] == []


def test_another_file_under_the_name_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(UserError, match=r"is a Git LFS pointer, not the file: run `git lfs pull`"):
        gguf_files.directory_of(path)
    path.write_bytes(b"PK\3\4" * 100)
    with pytest.raises(UserError, match=r"model\.gguf: not a GGUF file \(it does not begin with GGUF\)"):
        gguf_files.directory_of(path)


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path, cache: Path) -> None:
    written = write(tmp_path / "model.gguf", "qwen2", Type.F16)
    content = bytearray(written.path.read_bytes())
    content[-4:] = b"\x00\x7c\x00\x7c"  # infinity, twice
    written.path.write_bytes(content)
    with pytest.raises(UserError, match=r"holds numbers that are not finite; download the file again"):
        gguf_files.directory_of(written.path)
    assert [each for each in cache.rglob("*") if each.is_file()] == []


@pytest.mark.parametrize("kind", ["teacher", "student"])
def test_a_gguf_file_that_is_not_there_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"no file \S+/mine\.gguf; give a directory or a hub id"):
        getattr(catalog, f"load_{kind}")("mine.gguf")
