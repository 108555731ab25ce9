"""The integrity gate: what it proves on good rows, and the line a user reads for each way of failing."""

import json

import numpy as np
import pytest
import train_support as support

from distill.chat import Chat
from distill.errors import UserError
from distill.train import gate
from distill.train.data import Row, collate, encode

TRACES = support.sums(12)

# What the published R1 template does to an assistant's turn: only what follows </think> is kept.
R1 = """{%- for m in messages -%}
{%- if m['role'] == 'user' -%}{{ '<|im_start|>user\n' + m['content'] + '<|im_end|>\n' }}{%- endif -%}
{%- if m['role'] == 'assistant' -%}
{%- set content = m['content'].split('</think>')[-1] -%}
{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"""
NO_END = """{%- for m in messages -%}{{ m['role'] + ': ' + m['content'] }}{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'assistant: ' }}{%- endif -%}"""


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return support.make_student(tmp_path_factory.mktemp("student"))


def load(student, tmp_path, template):
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return Chat.load(student, str(path))


def prove(chat, traces=TRACES, content="reasoning", vocabulary=272, context=512, pad_id=257):
    return gate.prove(encode(traces, chat, content, 256, 0), chat, content, vocabulary, context, pad_id)


def test_good_rows_pass_and_the_lines_say_what_holds(student):
    lines = "\n".join(prove(Chat.load(student, "chatml")))
    assert "12 rows" in lines and "first longest random" in lines
    assert "exactly the completion" in lines and "characters of reasoning included" in lines
    assert "every row ends in a supervised <|im_end|>" in lines
    supervised = sum(len(t.text) + 1 for t in TRACES)  # byte-level: a character is a token, and the end token
    assert f"{supervised:,} of " in lines


def test_the_answer_alone_passes_as_a_control(student):
    lines = "\n".join(prove(Chat.load(student, "chatml"), content="answer"))
    assert "the reasoning is left out" in lines


def test_pad_equal_to_the_end_token_passes(student):
    assert prove(Chat.load(student, "chatml"), pad_id=256)


def test_a_template_that_deletes_the_reasoning(student, tmp_path):
    with pytest.raises(UserError, match=r"deletes the reasoning: of trace .* set train\.chat_template to `chatml`"):
        prove(load(student, tmp_path, R1))


def test_the_same_template_with_a_prefilled_think_tag(student, tmp_path):
    """The newer published R1 template opens <think> itself: then its training row cannot begin with its prompt."""
    prefilled = R1.replace("assistant\n' }}{%- endif -%}", "assistant\n<think>\n' }}{%- endif -%}")
    assert prefilled != R1
    with pytest.raises(UserError, match=r"does not begin with its inference prompt.*`train\.chat_template`"):
        prove(load(student, tmp_path, prefilled))


def test_a_template_that_changes_the_text_is_shown_where(student, tmp_path):
    changed = R1.replace(".split('</think>')[-1]", ".replace('answer', 'reply')")
    with pytest.raises(UserError, match=r"from character \d+ on \('reply is .* instead of 'answer is "):
        prove(load(student, tmp_path, changed))


def test_a_template_without_an_end_token(student, tmp_path):
    with pytest.raises(UserError, match=r"does not end in an end token.*never learn to stop; set train\.chat_template"):
        prove(load(student, tmp_path, NO_END))


def test_a_base_model_without_a_template_says_which_to_set(student):
    with pytest.raises(UserError, match=r"has no chat template; set .*chatml, llama3"):
        Chat.load(student)


def test_a_vocabulary_smaller_than_the_tokenizer(student):
    with pytest.raises(UserError, match=r"gives id 258 \(<\|im_start\|>\) but the model's vocabulary ends at 257"):
        prove(Chat.load(student, "chatml"), vocabulary=258)


def test_a_row_longer_than_the_context(student):
    with pytest.raises(UserError, match=r"tokens and the model's context is 64: set train\.max_length to 64 "):
        prove(Chat.load(student, "chatml"), context=64)


def test_a_prompt_that_inference_would_not_send(student):
    chat = Chat.load(student, "chatml")
    data = encode(TRACES, chat, "reasoning", 256, 0)
    data.rows = [Row(r.key, np.concatenate([r.ids[:1], r.ids]), r.prompt_tokens + 1) for r in data.rows]
    with pytest.raises(UserError, match="does not begin with the prompt that inference will send"):
        gate.prove(data, chat, "reasoning", 272, 512, 257)


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_that_is_off_by_one_is_noticed(student, shift):
    """The bug is put into the batch, where a collator would make it: all targets moved by one position."""
    chat = Chat.load(student, "chatml")
    rows = encode(TRACES, chat, "reasoning", 256, 0).rows[:3]
    batch = collate(rows, 257)
    gate.prove_mask(rows, batch, 257)
    with pytest.raises(AssertionError, match="does not cover exactly the completions"):
        gate.prove_mask(rows, type(batch)(batch.input_ids_bt, batch.positions_s + shift, batch.targets_s), 257)


def test_text_that_tokenizers_may_normalise_is_not_a_failure(student):
    """A tokenizer with NFC (as Qwen's) gives back composed characters; the trace has them decomposed."""
    chat = Chat.load(student, "chatml")
    state = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    from tokenizers import Tokenizer

    chat.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert prove(chat, [support.trace("q", "<think>\ncafe\u0301 \u00a0x</think>\n\nso")])
