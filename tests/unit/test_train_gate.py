"""The integrity gate: what it proves on good rows, and the line a user reads for each way of failing."""

import json
from dataclasses import replace

import numpy as np
import pytest
import train_support as support

from distill.chat import Chat
from distill.errors import UserError
from distill.train.rows import gate
from distill.train.rows.batches import collate
from distill.train.rows.encode import Encoder, Encoding, Source
from distill.train.rows.gate import Limits

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


@pytest.fixture
def encode(tmp_path):
    def encode(chat, traces=TRACES, content="reasoning", **encoding):
        encoder = Encoder(tmp_path / "tokens", chat, Encoding(**({"max_length": 256, "content": content} | encoding)))
        for _ in encoder.add(Source("test", traces, plain=True), 0):
            pass
        return encoder.finish(), encoder.witnesses

    return encode


@pytest.fixture
def prove(encode):
    def prove(chat, traces=TRACES, content="reasoning", vocabulary=272, context=512, **encoding):
        return gate.prove(*encode(chat, traces, content, **encoding), chat, content, Limits(vocabulary, context))

    return prove


def test_good_rows_pass_and_the_lines_say_what_holds(student, prove):
    lines = "\n".join(prove(Chat.load(student, "chatml")))
    assert "12 rows" in lines and "(first, longest, random)" in lines
    assert "exactly the completion" in lines and "characters of reasoning" in lines
    assert "all rows end in a supervised <|im_end|>" in lines
    supervised = sum(len(t.text) + 1 for t in TRACES)  # byte-level: a character is a token, and the end token
    assert f"supervised tokens: {supervised:,} of " in lines


def test_the_answer_alone_passes_as_a_control(student, prove):
    lines = "\n".join(prove(Chat.load(student, "chatml"), content="answer"))
    assert "without the reasoning" in lines


def test_rows_that_were_cut_may_end_without_an_end_token_and_it_is_said(student, prove):
    lines = "\n".join(prove(Chat.load(student, "chatml"), max_length=90, overlong="truncate"))
    assert "9 of 12 rows end in a supervised <|im_end|>" in lines


def test_two_sources_may_hold_samples_of_one_prompt(student, tmp_path):
    chat = Chat.load(student, "chatml")
    encoder = Encoder(tmp_path / "tokens", chat, Encoding(256))
    for number, text in enumerate(("<think>\none\n</think>\n\n1", "<think>\nanother\n</think>\n\n2")):
        for _ in encoder.add(Source("test", [support.trace("q?", text)]), number):
            pass
    assert gate.prove(encoder.finish(), encoder.witnesses, chat, "reasoning", Limits(272, 512))


def test_rows_without_reasoning_are_counted(student, prove):
    lines = "\n".join(prove(Chat.load(student, "chatml"), [*TRACES, support.trace("1+1?", "2")]))
    assert "without reasoning: 1 rows, as train.data allows" in lines


def test_a_template_that_deletes_the_reasoning(student, tmp_path, prove):
    with pytest.raises(
        UserError, match=r"deletes the reasoning: \d+ characters .* set train\.chat_template to `chatml`"
    ):
        prove(load(student, tmp_path, R1))


def test_the_same_template_with_a_prefilled_think_tag(student, tmp_path, prove):
    """The newer published R1 template opens <think> itself: then its training row cannot begin with its prompt."""
    prefilled = R1.replace("assistant\n' }}{%- endif -%}", "assistant\n<think>\n' }}{%- endif -%}")
    assert prefilled != R1
    with pytest.raises(UserError, match=r"does not begin with its inference prompt.*`train\.chat_template`"):
        prove(load(student, tmp_path, prefilled))


def test_a_template_that_changes_the_text_is_shown_where(student, tmp_path, prove):
    changed = R1.replace(".split('</think>')[-1]", ".replace('answer', 'reply')")
    with pytest.raises(UserError, match=r"from character \d+ on \('reply is .* instead of 'answer is "):
        prove(load(student, tmp_path, changed))


def test_a_template_without_an_end_token(student, tmp_path, prove):
    with pytest.raises(UserError, match=r"does not end in an end token.*never learn to stop; set train\.chat_template"):
        prove(load(student, tmp_path, NO_END))


def test_a_base_model_without_a_template_says_which_to_set(student):
    with pytest.raises(UserError, match=r"has no chat template; .* `train.chat_template` to chatml"):
        Chat.load(student)


def test_a_vocabulary_smaller_than_the_tokenizer(student, prove):
    with pytest.raises(UserError, match=r"gives id 258 \(<\|im_start\|>\), but the model's vocabulary ends at 257"):
        prove(Chat.load(student, "chatml"), vocabulary=258)


def test_a_row_longer_than_the_context(student, prove):
    with pytest.raises(
        UserError, match=r"tokens and the model's context is 64, beyond which its RoPE .*: set train\.max_length to 64 "
    ):
        prove(Chat.load(student, "chatml"), context=64)


def test_a_prompt_that_inference_would_not_send(student, encode):
    chat = Chat.load(student, "chatml")
    rows, witnesses = encode(chat)
    rows.ids = np.concatenate(
        [np.concatenate([row.ids[:1], row.ids]) for row in rows]
    )  # each row begins with one too many
    rows.lengths, rows.prompt_tokens = rows.lengths + 1, rows.prompt_tokens + 1
    rows.starts = np.cumsum(rows.lengths) - rows.lengths
    with pytest.raises(UserError, match="does not begin with the prompt that inference will send"):
        gate.prove(rows, witnesses, chat, "reasoning", Limits(272, 512))


@pytest.mark.parametrize("shift", [-1, 1])
def test_a_mask_that_is_off_by_one_is_noticed(student, shift, encode):
    """The bug is put into the batch, where a collator would make it: all targets moved by one position."""
    chat = Chat.load(student, "chatml")
    rows = list(encode(chat)[0])[:3]
    batch = collate(rows)
    gate.prove_mask(rows, batch)
    with pytest.raises(AssertionError, match="does not cover exactly the completions"):
        gate.prove_mask(rows, replace(batch, positions_s=batch.positions_s + shift))


def test_positions_that_run_on_are_noticed(student, encode):
    rows = list(encode(Chat.load(student, "chatml"))[0])[:3]
    batch = collate(rows)
    with pytest.raises(AssertionError, match="positions do not restart"):
        gate.prove_mask(rows, replace(batch, position_ids_t=batch.position_ids_t.new_tensor(range(sum(batch.lengths)))))


def test_text_that_tokenizers_may_normalise_is_not_a_failure(student, prove):
    """A tokenizer with NFC (as Qwen's) gives back composed characters; the trace has them decomposed."""
    chat = Chat.load(student, "chatml")
    state = json.loads(chat.tokenizer.backend_tokenizer.to_str())
    state["normalizer"] = {"type": "NFC"}
    from tokenizers import Tokenizer

    chat.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    assert prove(chat, [support.trace("q", "<think>\ncafe\u0301 \u00a0x</think>\n\nso")])


def with_token(rows, row, place, id_):
    """The rows with one id of one row replaced; place: counted from its first supervised token."""
    rows.ids = rows.ids.copy()
    rows.ids[rows.starts[row] + rows.prompt_tokens[row] + place] = id_
    return rows


@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>", "<|endoftext|>"])
def test_a_control_token_inside_a_row_is_refused_with_the_row(student, encode, token):
    """In any row, not only in those that are compared token by token."""
    chat = Chat.load(student, "chatml")
    rows, witnesses = encode(chat, support.sums(40))
    compared = {trace.key for _, trace in witnesses.values()}
    row = next(i for i in range(30, 40) if rows.keys[i] not in compared)
    with_token(rows, row, 3, chat.tokenizer.convert_tokens_to_ids(token))
    key, sample = rows.keys[row]
    expected = rf"^trace {key} sample {sample}: the control token .* is supervised token 4 of \d+, .*1 of 40 rows"
    with pytest.raises(UserError, match=expected):
        gate.prove(rows, witnesses, chat, "reasoning", Limits(272, 512))


@pytest.mark.parametrize("place", [-3, -2])
def test_control_tokens_of_the_prompt_and_at_the_end_are_meant(student, encode, place):
    chat = Chat.load(student, "chatml")
    rows, _ = encode(chat)
    row = int(np.argmax(rows.lengths))
    assert rows.ids[rows.starts[row] + rows.lengths[row] - 1] in chat.stop_token_ids
    gate.prove_control_tokens(with_token(rows, row, place, chat.eos_token_id), chat)


def test_a_row_that_was_cut_has_no_end_at_which_a_control_token_is_meant(student, encode):
    chat = Chat.load(student, "chatml")
    rows, _ = encode(chat, max_length=90, overlong="truncate")
    row = int(np.argmax(rows.truncated))
    gate.prove_control_tokens(rows, chat)
    with pytest.raises(UserError, match="the control token"):
        gate.prove_control_tokens(with_token(rows, row, rows[row].supervised - 1, chat.eos_token_id), chat)
