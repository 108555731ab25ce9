"""The gate on rollouts, with the tiny pair: what it proves, and the line a user reads for each way of failing."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distill import backends
from distill.chat import Chat, split_reasoning
from distill.errors import UserError
from distill.models import Model, teacher_of
from distill.prompts.prompt import Prompt
from distill.recipe import LocalEngine
from distill.traces.trace import Trace
from distill.train.rollouts import gate
from distill.train.rollouts.agreement import ANSWER, CLOSING, END, REASONING, spans
from distill.train.rollouts.questions import Questions
from distill.train.rows.align import Projector, Vocabulary, token_bytes

ROOT = Path(__file__).resolve().parents[2]
STUDENT, TEACHER = ROOT / "students" / "tiny-qwen", ROOT / "teachers" / "tiny-r1"
CARD = "teacher_template"
SYSTEM = "You check every sum twice."

# ChatML with one thing changed: {0} before the messages, {1} in a system message, {2} after an assistant's text.
CHATML = """{{%- for m in messages -%}}
{0}{{%- if m['role'] != 'system' -%}}{{{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}}}
{{%- if m['role'] == 'assistant' -%}}{2}{{%- else -%}}{{{{ '<|im_end|>\n' }}}}{{%- endif -%}}
{{%- else -%}}{1}{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{{{{ '<|im_start|>assistant\n' }}}}{{%- endif -%}}"""
SYSTEM_TURN = "{{ '<|im_start|>system\n' + m['content'] + '<|im_end|>\n' }}"
END_TURN = "{{ '<|im_end|>\n' }}"


def chatml(before="", system=SYSTEM_TURN, end=END_TURN):
    return CHATML.format(before, system, end)


def load(directory, tmp_path=None, template=None):
    if template is None:
        return Chat.load(directory)
    path = tmp_path / "template.jinja"
    path.write_text(template)
    return Chat.load(directory, str(path))


@pytest.fixture(scope="module")
def student():
    return Chat.load(STUDENT)


@pytest.fixture(scope="module")
def teacher():
    return Chat.load(TEACHER)


def rollout(chat, text, sample=0, messages=None, finish="stop", ids=None, prompt=None):
    """A rollout as the engine returns it: the student was sure of every token at 0.9."""
    messages = messages or ({"role": "user", "content": f"What is {20 + sample} + 22?"},)
    prompt = prompt or Prompt(tuple(messages), "math", str(42 + sample))
    if ids is None:
        ids = [
            *chat.text_ids(text.removeprefix(chat.prefill)),
            *([chat.stop_token_ids[-1]] if finish == "stop" else []),
        ]
    return Trace(
        prompt,
        sample,
        0,
        text,
        *split_reasoning(text),
        finish,
        "student",
        prompt_token_ids=tuple(chat.prompt_ids(prompt.messages)),
        completion_token_ids=tuple(ids),
        logprobs=(math.log(0.9),) * len(ids),
    )


def text_of(number):
    return f"<think>\n{20 + number} + 22 = {42 + number}\n</think>\n\nThe answer is \\boxed{{{42 + number}}}."


def rollouts_of(chat, count=4, **settings):
    return [rollout(chat, text_of(i), i, **settings) for i in range(count)]


def asked_of(teacher, rollouts):
    """The rollouts as a teacher is asked them, whose text it tokenises."""
    views = []
    for trace in rollouts:
        ids = [*teacher.text_ids(trace.text.removeprefix(teacher.prefill)), teacher.stop_token_ids[-1]]
        prompt = tuple(teacher.prompt_ids_of(trace.prompt.messages, trace.text))
        views.append(replace(trace, prompt_token_ids=prompt, completion_token_ids=tuple(ids), logprobs=None))
    return views


def sure(rollouts, chat, **chances):
    """Distributions of a teacher that gives the student's tokens 0.8, or the probability of their kind."""
    pieces = token_bytes(chat.tokenizer, chat.where)
    distributions = []
    for trace in rollouts:
        kinds = spans(trace, pieces, chat)
        ids = np.array([[id_, 0] for id_ in trace.completion_token_ids], np.int32)
        names = {REASONING: "reasoning", CLOSING: "closing", ANSWER: "answer", END: "end", None: ""}
        chance = np.array([chances.get(names[kind], 0.8) for kind in kinds])
        with np.errstate(divide="ignore", invalid="ignore"):
            logprobs = np.log(np.stack([chance, np.where(chance < 0, np.nan, 0.05)], 1)).astype(np.float32)
        logprobs[np.isnan(logprobs)] = -np.inf  # a negative chance: not known
        distributions.append((ids, logprobs))
    return distributions


def prove_teacher(student, teacher, rollouts, scored=None, distributions=None):
    scored = asked_of(teacher, rollouts) if scored is None else scored
    distributions = sure(rollouts, student) if distributions is None else distributions
    return gate.prove_teacher(rollouts, scored, distributions, student, teacher)


def refused(function, *arguments, **settings):
    with pytest.raises(UserError) as caught:
        function(*arguments, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def warnings(lines):
    return [line for line in lines if line.startswith("warning: ")]


# ---- the real pair


def sampled(backend, prompts):
    params = backends.SamplingParams(temperature=0.0, max_new_tokens=160, logprobs=1)
    return list(backend.complete([backends.Job(prompt, (0,)) for prompt in prompts], params, 0))


def test_the_tiny_pair_passes_with_the_teachers_own_numbers(student, teacher):
    """The texts are the teacher's, so it expects every token of them, aligned to another tokenizer."""
    prompts = [Prompt.from_question(f"What is {a} + {b}?", str(a + b)) for a, b in ((20, 22), (31, 14), (5, 60))]
    with backends.open(teacher_of("teacher", "tiny-r1"), LocalEngine(dtype="float32")) as backend:
        rollouts = [rollout(student, done.text, prompt=done.prompt) for done in sampled(backend, prompts)]
        scored = backend.score(rollouts, 8)
    projector = Projector(
        Vocabulary(token_bytes(teacher.tokenizer, ""), frozenset(teacher.stop_token_ids)),
        Vocabulary(token_bytes(student.tokenizer, ""), frozenset(student.stop_token_ids)),
        student.stop_token_ids[-1],
        student.text_ids,
    )
    distributions = []
    for ours, theirs in zip(rollouts, scored, strict=True):
        given, completion = teacher.prefill.encode(), theirs.completion_token_ids
        masses = projector.project(given, completion, theirs.logprobs, theirs.top_logprobs, ours.completion_token_ids)
        ids, logprobs = np.zeros((len(masses), 8), np.int32), np.full((len(masses), 8), -np.inf, np.float32)
        for row, found in enumerate(masses):
            for column, (id_, logprob) in enumerate((found or {}).items()):
                ids[row, column], logprobs[row, column] = id_, logprob
        distributions.append((ids, logprobs))
    gate.check_student(student)
    gate.check_teacher(student, teacher)
    assert "truncated: 0 of 3 (0%)" in "\n".join(gate.prove_rollouts(rollouts, student))
    lines = gate.prove_teacher(rollouts, scored, distributions, student, teacher)
    assert not warnings(lines)
    text = "\n".join(lines)
    assert "asked exactly the student's prompts and texts" in text
    assert "<|im_end|> stands for the teacher's <｜end▁of▁sentence｜>" in text
    end = next(line for line in lines if line.strip().startswith("end of turn: teacher"))
    assert "at 3 of 3 tokens" in end and float(end.split()[4]) > 0.9


def test_what_the_engine_samples_of_the_base_passes(student, teacher):
    """The base answers at once, where the teacher's template opens a reasoning: the teacher is asked without it."""
    prompts = [Prompt.from_question(f"What is 20 + {b}?", str(20 + b)) for b in range(4)]
    with backends.open(Model("student", STUDENT), LocalEngine(dtype="float32")) as backend:
        done = sampled(backend, prompts)
    rollouts = [
        rollout(student, each.text, finish=each.finish_reason, ids=each.completion_token_ids, prompt=each.prompt)
        for each in done
    ]
    assert "  end of turn: 4 with <|im_end|>" in gate.prove_rollouts(rollouts, student)
    lines = "\n".join(prove_teacher(student, teacher, rollouts))
    assert "4 of 4 do not begin with '<think>\\n', which the teacher's template opens" in lines


# ---- before the first rollout


def test_rollouts_longer_than_a_limit_are_refused(student):
    prompts = [Prompt.from_question(question, "1") for question in ("1?", "1 + 1 + 1 + 1 + 1?", "2?")]
    longest = len(student.prompt_ids(prompts[1].messages))
    limits = {"the student's context": longest + 64, "train.max_length": 4096}
    gate.check_lengths(Questions(prompts, student), 64, limits)
    gate.check_lengths(Questions([], student), 64, limits)
    message = refused(gate.check_lengths, Questions(prompts, student), 65, limits)
    assert f"prompt {prompts[1].id} has {longest} tokens" in message
    assert f"exceeds the student's context of {longest + 64} tokens" in message and "to at most 64" in message
    assert "leave such prompts out" in refused(
        gate.check_lengths, Questions(prompts, student), 1, {"its context": longest}
    )


def test_a_template_that_never_ends_a_turn_is_refused(tmp_path):
    chat = load(STUDENT, tmp_path, chatml(end=""))
    message = refused(gate.check_student, chat)
    assert "without a token that stops generation" in message and "train.chat_template" in message
    gate.check_student(load(STUDENT, tmp_path, chatml()))


def test_a_tokenizer_that_is_not_byte_level_is_refused(tmp_path, student, teacher):
    directory = tmp_path / "other"
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(directory)
    other = Chat.load(directory, "chatml")
    for pair in ((other, teacher), (student, other)):
        assert f"tokenizer of {directory} is not byte-level" in refused(gate.check_teacher, *pair)


# ---- what the student is asked and writes


def test_rollouts_of_another_template_or_tokenizer_are_refused(student, tmp_path):
    rollouts = rollouts_of(student)
    assert "equal to the student's prompts and texts" in gate.prove_rollouts(rollouts, student)[0]
    other = load(STUDENT, tmp_path, chatml(before="{%- if loop.first -%}{{ 'Hello.' }}{%- endif -%}"))
    assert "does not begin with the prompt" in refused(gate.prove_rollouts, rollouts, other)
    changed = [replace(rollouts[0], text=rollouts[0].text + "!"), *rollouts[1:]]
    message = refused(gate.prove_rollouts, changed, student)
    assert "decode to another text" in message and "--fresh train" in message


def test_a_rollout_that_ends_without_an_end_token_is_refused(student):
    rollouts = rollouts_of(student)
    ids = rollouts[2].completion_token_ids[:-1]
    rollouts[2] = replace(rollouts[2], completion_token_ids=ids)
    message = refused(gate.prove_rollouts, rollouts, student)
    assert "sample 2 ended (stop) without an end token" in message and "<|im_end|>" in message


def test_truncated_rollouts_are_counted_and_refused_where_there_is_nothing_else(student):
    cut = [rollout(student, text_of(i)[:20], i, finish="length") for i in range(3)]
    lines = gate.prove_rollouts([*cut, *rollouts_of(student, 1)], student)
    assert "  truncated: 3 of 4 (75%)" in lines and "  end of turn: 1 with <|im_end|>" in lines
    message = refused(gate.prove_rollouts, cut, student)
    assert "all 3 rollouts were cut off" in message and f"raise {gate.MAX_NEW}" in message


# ---- what the teacher is asked

ASKED = ({"role": "system", "content": SYSTEM}, {"role": "user", "content": "What is 20 + 22?"})


@pytest.mark.parametrize("damaged", ["student", "teacher"])
@pytest.mark.parametrize("system", ["", "{{ '<|im_start|>system\n' + m['content'][:9] + '<|im_end|>\n' }}"])
def test_a_template_that_leaves_out_a_message_is_refused(tmp_path, damaged, system):
    good, bad = load(STUDENT), load(STUDENT, tmp_path, chatml(system=system))
    student, teacher = (bad, good) if damaged == "student" else (good, bad)
    rollouts = rollouts_of(student, 2, messages=ASKED)
    gate.prove_rollouts(rollouts, student)
    message = refused(prove_teacher, student, teacher, rollouts)
    assert f"leaves out or changes the system message '{SYSTEM}'" in message
    assert "train.chat_template" in message and CARD in message


def test_messages_that_both_templates_keep_pass_and_so_do_changes_of_white_space(tmp_path):
    trimming = load(STUDENT, tmp_path, chatml().replace("m['content']", "m['content'] | trim"))
    student = load(STUDENT)
    messages = [{"role": "system", "content": f" {SYSTEM}\n\n"}, {"role": "user", "content": "20  +  22?\n"}]
    assert not warnings(prove_teacher(student, trimming, rollouts_of(student, messages=messages)))


def test_words_that_one_template_adds_are_reported(tmp_path):
    before = "{%- if loop.first -%}{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{%- endif -%}"
    plain, adding = load(STUDENT), load(STUDENT, tmp_path, chatml(before=before))
    for student, teacher in ((plain, adding), (adding, plain)):
        (warning,) = warnings(prove_teacher(student, teacher, rollouts_of(student)))
        assert f"chat template of {adding.where} adds words" in warning and "You are a helpful assistant." in warning
    assert not warnings(prove_teacher(adding, adding, rollouts_of(adding)))


def test_a_teacher_that_reads_an_answer_as_reasoning_is_refused(student, teacher):
    """tinker-cookbook#796: its prompt has opened a reasoning that the student's text does not begin with."""
    plain = [rollout(student, f"The answer is {42 + i}.", i) for i in range(3)]
    opened = [
        replace(theirs, prompt_token_ids=tuple(teacher.prompt_ids(theirs.prompt.messages)))
        for theirs in asked_of(teacher, plain)
    ]
    assert "3 of 3 rollouts are another text for the teacher" in refused(
        prove_teacher, student, teacher, plain, scored=opened
    )
    mixed = [*plain[:1], *rollouts_of(student, 3)]
    lines = prove_teacher(student, teacher, mixed, scored=[opened[0], *asked_of(teacher, mixed[1:])])
    assert "1 of 4 rollouts are another text" in warnings(lines)[0]
    assert "1 of 4 do not begin with" in "\n".join(prove_teacher(student, teacher, mixed))


def test_an_end_token_that_the_teachers_is_not_aligned_to_is_refused(teacher, tmp_path):
    """Qwen3#1799, ms-swift#9526: the base ends with <|endoftext|>, its template with <|im_end|>."""
    directory = tmp_path / "student"
    shutil.copytree(STUDENT, directory)
    vocabulary = Chat.load(STUDENT).tokenizer.get_vocab()
    other = vocabulary["<|endoftext|>"]
    config = json.loads((directory / "generation_config.json").read_text())
    (directory / "generation_config.json").write_text(json.dumps(config | {"eos_token_id": [other]}))
    student = Chat.load(directory)
    assert student.stop_token_ids[-1] != other and other in student.stop_token_ids
    ids = [*student.text_ids(text_of(0)), other]
    ending = rollout(student, text_of(0), ids=ids)
    assert "1 with <|endoftext|>" in "\n".join(gate.prove_rollouts([ending], student))
    message = refused(prove_teacher, student, teacher, [ending])
    assert "1 of 1 rollouts that ended did so with <|endoftext|>" in message and "<|im_end|>" in message
    (warning,) = warnings(prove_teacher(student, teacher, [ending, *rollouts_of(student, 3)]))
    assert "1 of 4 rollouts that ended did so with <|endoftext|>" in warning


# ---- where teacher and student put their probability


def test_probabilities_are_reported_by_kind_of_span(student, teacher):
    rollouts = rollouts_of(student)
    distributions = sure(rollouts, student, reasoning=0.5, closing=0.6, answer=0.7, end=0.25)
    lines = prove_teacher(student, teacher, rollouts, distributions=distributions)
    assert not warnings(lines)
    by_kind = {line.strip().partition(":")[0]: line for line in lines if line.startswith("    ")}
    for kind, chance in ((REASONING, "0.5"), (CLOSING, "0.6"), (ANSWER, "0.7"), (END, "0.25")):
        assert f"teacher {chance} ({chance}), student 0.9 (0.9)" in by_kind[kind]
    assert "at 4 of 4 tokens" in by_kind[END] and "at 4 of 4 tokens" in by_kind[CLOSING]


@pytest.mark.parametrize(
    ("chances", "words"),
    [
        ({"end": 1e-6}, ("the end token <|im_end|>", "1e-06", "the student's 0.9", "<｜end▁of▁sentence｜>", CARD)),
        ({"closing": 1e-6}, ("writes </think>", "1e-06", "at 4 places")),
        ({"end": -1.0}, ("the end token <|im_end|> is not known at any of 4 places",)),
        ({"closing": -1.0}, ("of </think> is not known at any of 4 places",)),
        ({"answer": 0.01}, ("other text than the student's (answer)", "mean probability 0.01", "the student's 0.9")),
        ({"reasoning": 0.01}, ("(reasoning)",)),
    ],
)
def test_a_teacher_that_expects_something_else_is_a_warning_with_numbers(student, teacher, chances, words):
    rollouts = rollouts_of(student)
    lines = prove_teacher(student, teacher, rollouts, distributions=sure(rollouts, student, **chances))
    (warning,) = warnings(lines)
    assert all(word in warning for word in words), warning


def test_a_student_that_never_closes_its_reasoning_is_a_warning(student, teacher):
    rollouts = [rollout(student, "<think>\n20 + 22 = 42", i) for i in range(2)]
    assert "no rollout contains </think>" in warnings(prove_teacher(student, teacher, rollouts))[0]


def test_a_teacher_that_knows_no_token_is_refused(student, teacher):
    rollouts = rollouts_of(student)
    nothing = sure(rollouts, student, **dict.fromkeys(("reasoning", "closing", "answer", "end", ""), -1.0))
    assert "begins where a token of" in refused(prove_teacher, student, teacher, rollouts, distributions=nothing)


def test_a_token_outside_the_teachers_list_gets_the_least_that_is_left(student, teacher):
    rollouts = rollouts_of(student, 1)
    listed = sure(rollouts, student)
    ids, logprobs = listed[0]
    other = np.array(student.text_ids("x")[0], np.int32)
    ids[-1] = [other, other + 1]  # 0.8 and 0.05: at most 0.05 is left for the end token
    lines = prove_teacher(student, teacher, rollouts, distributions=[(ids, logprobs)])
    assert "teacher 0.05 (0.05)" in next(line for line in lines if line.startswith(f"    {END}"))


def test_spans_by_hand(student):
    pieces = token_bytes(student.tokenizer, "")
    trace = rollout(student, "<think>\na</think>b")
    kinds = spans(trace, pieces, student)
    texts: dict[str | None, str] = {}
    for id_, kind in zip(trace.completion_token_ids, kinds, strict=True):
        texts[kind] = texts.get(kind, "") + pieces[id_].decode()
    assert texts[REASONING] == "<think>\na" and texts[ANSWER] == "b" and texts[END] == "<|im_end|>"
    assert texts[CLOSING] + texts.get(None, "") == "</think>"
    cut = rollout(student, "<think>\nab", finish="length")
    assert set(spans(cut, pieces, student)) == {REASONING}
    assert set(spans(rollout(student, "ab", finish="length"), pieces, student)) == {ANSWER}
    beyond = replace(cut, completion_token_ids=(*cut.completion_token_ids, 10**6))  # an id of a padded embedding
    assert spans(beyond, pieces, student)[-1] == REASONING
