"""Templates and tags: what is split, put back, supervised, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_support import ANSWERED, BARE, QUESTION, QWEN3, R1_INFERENCE, V3_1, save_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from distill.chat import Chat, read_template, split_reasoning
from distill.errors import UserError


@pytest.mark.parametrize(
    ("text", "reasoning", "response"),
    [
        ("<think>\na b\n</think>\n\n4", "a b", "4"),
        ("a b</think>4", "a b", "4"),  # the prompt had opened the block
        ("<think></think>4", "", "4"),
        ("4", None, "4"),
        ("<think>never closed", None, ""),
        ("so <think>a</think>4", "so <think>a", "4"),  # text before the tag: not R1's form, nothing is lost
        ("<think>a</think>b</think>4", "a", "b</think>4"),  # the first closing tag ends it
        ("<think>a</think>The tag `</think>` ends it.", "a", "The tag `</think>` ends it."),
        ("a</think>`<think>` and `</think>`", "a", "`<think>` and `</think>`"),
    ],
)
def test_split_reasoning(text: str, reasoning: str | None, response: str) -> None:
    assert split_reasoning(text) == (reasoning, response)


@given(st.text(), st.text())
def test_split_finds_what_was_put_together(reasoning: str, response: str) -> None:
    if "think>" not in reasoning + response:
        assert split_reasoning(f"<think>\n{reasoning}\n</think>\n\n{response}") == (reasoning.strip(), response.strip())


def test_training_ids_begin_with_the_inference_prompt_and_end_with_the_turn(tmp_path: Path) -> None:
    chat = Chat.load(save_tokenizer(tmp_path, None), "chatml")
    ids, prompt = chat.training_ids(ANSWERED)
    assert ids[:prompt] == chat.prompt_ids(QUESTION)
    assert chat.tokenizer.decode(ids[prompt:]) == "<think>\ntwo\n</think>\n\n2<|im_end|>"  # not the newline after it
    assert ids[-1] in chat.stop_token_ids
    assert chat.decode(ids[prompt:]) == "<think>\ntwo\n</think>\n\n2"
    assert chat.prefill == ""


def test_r1s_inference_template_is_refused_for_training_and_its_prefill_is_put_back(tmp_path: Path) -> None:
    chat = Chat.load(save_tokenizer(tmp_path, R1_INFERENCE))
    assert chat.prefill == "<think>\n"
    assert chat.restore("two\n</think>\n\n2") == "<think>\ntwo\n</think>\n\n2"
    with pytest.raises(
        UserError,
        match=r"deletes the reasoning and renders .* does not begin with its inference prompt.*train\.chat_template",
    ):
        chat.training_ids(ANSWERED)


@pytest.mark.parametrize(
    ("template", "thinking", "opened", "prefill", "completion", "stored"),
    [
        (R1_INFERENCE, None, "<|assistant|><think>\n", "<think>\n", "two\n</think>\n\n2", ("two", "2")),
        (BARE, None, "<|assistant|>", "", "<think>\ntwo\n</think>\n\n2", ("two", "2")),
        (V3_1, True, "<|assistant|><think>", "<think>", "two</think>2", ("two", "2")),
        (V3_1, False, "<|assistant|></think>", "", "2", (None, "2")),
        (V3_1, None, "<|assistant|></think>", "", "2", (None, "2")),  # the template's own default
        (QWEN3, True, "<|im_start|>assistant\n", "", "<think>\ntwo\n</think>\n\n2", ("two", "2")),
        (QWEN3, False, "<think>\n\n</think>\n\n", "", "2", (None, "2")),
    ],
    ids=["r1", "r1-first", "v3.1-thinking", "v3.1-plain", "v3.1-default", "qwen3-thinking", "qwen3-plain"],
)
def test_what_the_prompt_opens_is_put_back_and_nothing_else(
    template: str,
    thinking: bool | None,
    opened: str,
    prefill: str,
    completion: str,
    stored: tuple[str | None, str],
    tmp_path: Path,
) -> None:
    chat = Chat.load(save_tokenizer(tmp_path, template), thinking=thinking)
    assert chat.prompt_text(QUESTION).endswith(opened)
    assert chat.tokenizer.decode(chat.prompt_ids(QUESTION)).endswith(opened), "the ids are in the mode too"
    assert chat.prefill == prefill
    assert chat.restore(completion) == prefill + completion
    assert split_reasoning(chat.restore(completion)) == stored


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("template", [R1_INFERENCE, BARE])
def test_a_mode_is_refused_where_there_is_only_one(template: str, thinking: bool, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has one mode only.*remove `thinking` from the teacher's card"):
        Chat.load(save_tokenizer(tmp_path, template), thinking=thinking)


LEVELS = "{% if reasoning_effort == 'max' %}think long{% endif %}" + V3_1


@pytest.mark.parametrize("thinking", [False, "high", "max"])
def test_levels_of_thinking(thinking: Any, tmp_path: Path) -> None:
    chat = Chat.load(save_tokenizer(tmp_path, LEVELS), thinking=thinking)
    text = chat.prompt_text(QUESTION)
    assert ("think long" in text) == (thinking == "max")
    assert text.endswith("<|assistant|><think>" if thinking else "<|assistant|></think>")


@pytest.mark.parametrize("template", [V3_1, QWEN3])
def test_a_level_is_refused_where_there_is_thinking_without_levels(template: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has no levels of thinking: set `thinking: true`"):
        Chat.load(save_tokenizer(tmp_path, template), thinking="max")


def test_a_base_without_a_template_is_told_which_to_set(tmp_path: Path) -> None:
    with pytest.raises(
        UserError,
        match=r"has no chat template; for a student set `train.chat_template` to chatml \(its tokens are here\)",
    ):
        Chat.load(save_tokenizer(tmp_path, None))


def test_a_tokenizer_class_in_a_directorys_own_code_is_not_run(tmp_path: Path) -> None:
    """DeepSeek-V2 and others bring one: the tokenizer is read from its data, without a question."""
    config = save_tokenizer(tmp_path, R1_INFERENCE) / "tokenizer_config.json"
    auto_map = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizerFast"]}
    named = json.loads(config.read_text()) | {"tokenizer_class": "OwnTokenizerFast", "auto_map": auto_map}
    config.write_text(json.dumps(named))
    (tmp_path / "tokenization_own.py").write_text("raise SystemExit('executed')\n")
    chat = Chat.load(tmp_path)
    assert chat.decode(chat.prompt_ids(QUESTION)) == "<|bos|><|user|>1 + 1?<|assistant|><think>\n"


def test_a_directory_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no usable tokenizer") as error:
        Chat.load(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        Chat.load(tmp_path)
    (tmp_path / "tiktoken.model").write_text("YQ== 0\n")
    with pytest.raises(
        UserError, match=r"tiktoken\.model does not say how text is split.*put the tokenizer\.json"
    ) as error:
        Chat.load(tmp_path)
    assert "\n" not in str(error.value)
    config = save_tokenizer(tmp_path, R1_INFERENCE) / "tokenizer_config.json"
    config.write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config\.json holds no settings"):
        Chat.load(tmp_path)


def test_an_unknown_template_lists_the_built_in_ones() -> None:
    with pytest.raises(UserError, match="no chat template 'chatmll'.*chatml, gemma, llama3"):
        read_template("chatmll")


@pytest.fixture(scope="module")
def chatml(tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat.load(save_tokenizer(tmp_path_factory.mktemp("chatml"), None), "chatml")


@given(text=st.text(alphabet=st.characters(codec="utf-8")))
def test_any_text_goes_through_the_template(chatml: Chat, text: str) -> None:
    chat = chatml
    ids, prompt = chat.training_ids([*QUESTION, {"role": "assistant", "content": text}])
    if "<|" not in text:
        assert chat.decode(ids[prompt:]) == text


def test_a_saved_tokenizer_is_one_that_transformers_4_knows(tmp_path: Path) -> None:
    """`TokenizersBackend` and how a tokenizer was loaded are of transformers 5; vLLM and SGLang may have another."""
    chat = Chat.load(save_tokenizer(tmp_path / "base", None), "chatml")
    (tmp_path / "saved").mkdir()
    chat.save(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast" and settings["eos_token"] == "<|im_end|>"
    assert not settings.keys() & {"backend", "is_local", "local_files_only"}
    again = Chat.load(tmp_path / "saved")
    assert again.training_ids(ANSWERED) == chat.training_ids(ANSWERED)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("tokenizer.json", b"{}", "no usable tokenizer"),
        (
            "tokenizer.json",
            b'{"version": "9.0", "model": {"type": "New"}}',
            "made by another version of the",
        ),
        ("tokenizer.json", b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer.*git lfs pull"),
        ("tokenizer.json", b"\xff", "no usable tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b"\xff\xfe", "tokenizer_config.json: not JSON"),
        ("tokenizer_config.json", b'{"bos_token": 5}', "bos_token is 5; it should be text"),
        ("tokenizer_config.json", b'{"eos_token": ["a"]}', r'eos_token is \["a"\]; it should be text'),
        ("tokenizer_config.json", b'{"eos_token": "<|im_end|>", "chat_template": 5}', "not text|usable tokenizer"),
        ("config.json", b"[]", "config.json holds no settings"),
        ("generation_config.json", b"{", "generation_config.json: not JSON"),
    ],
)
def test_damaged_files_of_a_tokenizer_are_one_line(tmp_path: Path, file: str, content: bytes, said: str) -> None:
    save_tokenizer(tmp_path, None)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=said) as error:
        Chat.load(tmp_path, None if b"chat_template" in content else "chatml")
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_a_template_whose_tokens_the_tokenizer_lacks_is_refused_and_not_recommended(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, None)
    with pytest.raises(UserError, match=r"llama3 writes <\|start_header_id\|>, .*<\|eot_id\|>, which the tok") as error:
        Chat.load(tmp_path, "llama3")
    assert "for a student set `train.chat_template` to chatml (its tokens are here)" in str(error.value)
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace("<|im_start|>", "<|turn|>"))
    with pytest.raises(UserError, match=r"chatml writes <\|im_start\|>, which the tok") as error:
        Chat.load(tmp_path, "chatml")
    needed = "chatml needs <|im_start|>; gemma needs <|turn>, <turn|>; llama3 needs"
    assert f"no built-in template fits this tokenizer: {needed}" in str(error.value)
