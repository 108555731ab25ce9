"""What a teacher says at the student's tokens: with its own tokenizer, with another, and where templates open the
reasoning."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import backends
from distill.backends.backend import Scored
from distill.backends.scoring import completion_ids
from distill.catalog import resolve_weights
from distill.chat import Chat, split_reasoning
from distill.models import Model, teacher_of
from distill.prompts.prompt import Prompt
from distill.recipe import LocalEngine
from distill.traces.trace import Trace
from distill.train.rollouts.student import Rollout
from distill.train.rollouts.teachers import Teacher

DIRECTORY = resolve_weights("student", "tiny-qwen")
STUDENT, TEACHER = Chat.load(DIRECTORY), teacher_of("teacher", "tiny-r1").chat
PROMPT = Prompt.from_question("What is 20 + 22?", "42")
THINK = "<think>\n"
OPENED = """{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""


@pytest.fixture(scope="module")
def opening(tmp_path_factory):
    """The student with a template that opens the reasoning."""
    path = tmp_path_factory.mktemp("template") / "template.jinja"
    path.write_text(OPENED)
    chat = Chat.load(DIRECTORY, str(path))
    assert chat.prefill == THINK == TEACHER.prefill and not STUDENT.prefill
    return chat


def rollout(chat, text, ended=True, top=()):
    """A rollout of `text`, prefill included. top: the student's likeliest tokens, at every position."""
    ids = [*chat.text_ids(text.removeprefix(chat.prefill)), *(chat.stop_token_ids[-1:] if ended else ())]
    trace = Trace(
        PROMPT,
        0,
        0,
        text,
        *split_reasoning(text),
        "stop" if ended else "length",
        "student",
        prompt_token_ids=tuple(chat.prompt_ids(PROMPT.messages)),
        completion_token_ids=tuple(ids),
        logprobs=(-0.1,) * len(ids),
    )
    return Rollout(trace, np.array([top] * len(ids), np.int32))


class Hand:
    """A backend that gives the token at place i the log-probability −(i + 1)/10, and lists it and what is asked for."""

    def __init__(self, chat):
        self.chat, self.asked = chat, []

    def scored(self, traces, top_k, ids=None):
        scored = []
        for number, trace in enumerate(traces):
            completion = completion_ids(trace, self.chat)
            self.asked.append(completion)
            assert ids is None or len(ids[number]) == len(completion)
            also = (
                [[id_ for id_ in row if id_ >= 0] for row in ids[number].tolist()] if ids else [[] for _ in completion]
            )
            width = max(map(len, also), default=0)
            top_ids = np.zeros((len(completion), width), np.int32)
            top_logprobs = np.full(top_ids.shape, -np.inf, np.float32)
            for place, rows in enumerate(also):
                top_ids[place, : len(rows)] = rows
                top_logprobs[place, : len(rows)] = [
                    -(place + 1) / 10 if id_ == completion[place] else -5.0 - i for i, id_ in enumerate(rows)
                ]
            own = np.array([-(i + 1) / 10 for i in range(len(completion))], np.float32)
            prompt = tuple(self.chat.prompt_ids_of(trace.prompt.messages, trace.text))
            scored.append(Scored(prompt, tuple(completion), own, top_ids, top_logprobs))
        return scored


def masses(distribution, place):
    ids, logprobs = distribution
    return {int(i): float(p) for i, p in zip(ids[place], logprobs[place], strict=True) if p > -np.inf}


def known(taught):
    return (taught.distribution[1] > -np.inf).any(1).tolist()


# ---- one tokenizer


def test_a_copy_of_the_student_says_what_the_student_does():
    """With one tokenizer the distribution is the copy's own at every position, stop tokens apart."""
    model = Model("student", DIRECTORY)
    written = rollout(STUDENT, "The answer is 42.", top=(5, 9, *STUDENT.stop_token_ids))
    trace = written.trace
    with backends.open(model, LocalEngine(dtype="float32")) as backend:
        taught = Teacher(backend, STUDENT, STUDENT, 6, asks=True).score([written])[0]
        assert written.likeliest is not None
        scored = backend.score([trace], 6, [written.likeliest])[0]
    assert taught.scored.completion_token_ids == trace.completion_token_ids and all(known(taught))
    for place, top in enumerate(scored.top_logprobs):
        said = masses(taught.distribution, place)
        expected = dict(top) | {trace.completion_token_ids[place]: scored.logprobs[place]}
        assert said == pytest.approx(expected, abs=1e-5)
        assert {5, 9, *STUDENT.stop_token_ids} <= said.keys()


# ---- two tokenizers


def test_positions_by_hand():
    """Tokens of the same bytes stand for each other; the student's candidates are asked for by the teacher's ids."""
    text = "The answer is 42."
    candidate = STUDENT.text_ids("4")[0]
    written = rollout(STUDENT, text, top=(candidate, STUDENT.stop_token_ids[-1]))
    backend = Hand(TEACHER)
    teacher = Teacher(backend, TEACHER, STUDENT, 2, asks=True)
    taught = teacher.score([written])[0]
    theirs = taught.scored.completion_token_ids
    assert TEACHER.decode(theirs) == text and theirs[-1] == TEACHER.stop_token_ids[-1]
    ours = written.trace.completion_token_ids
    starts = positions(teacher, TEACHER, theirs, 0)
    offset = 0
    for place, id_ in enumerate(ours):
        piece = b"" if id_ in STUDENT.stop_token_ids else teacher.projector.student.piece(id_)
        said = masses(taught.distribution, place)
        if offset in starts:
            i = starts[offset]
            if teacher.projector.teacher.piece(theirs[i]) == piece or not piece:
                assert said[id_] == pytest.approx(-(i + 1) / 10)
            assert {candidate, STUDENT.stop_token_ids[-1]} <= said.keys()
        else:
            assert not said
        offset += len(piece)
    assert known(taught)[0] and known(taught)[-1]


def positions(teacher, chat, ids, offset):
    """Offset in the text → the teacher's token that begins there."""
    starts = {}
    for i, id_ in enumerate(ids):
        starts[offset] = i
        offset += 0 if id_ in chat.stop_token_ids else len(teacher.projector.teacher.piece(id_))
    return starts


@pytest.mark.parametrize("ended", [True, False])
def test_a_rollout_that_was_cut_off_is_scored_without_an_end(ended):
    backend = Hand(TEACHER)
    taught = Teacher(backend, TEACHER, STUDENT, 2, asks=False).score([rollout(STUDENT, "The answer is 4", ended)])[0]
    assert (backend.asked[0][-1] == TEACHER.stop_token_ids[-1]) == ended
    assert TEACHER.decode(backend.asked[0]) == "The answer is 4" and all(known(taught)[:1])


def test_nothing_of_the_teacher_is_known_of_its_own_opening():
    """The student was cut off after what the teacher's template opens: there is nothing to score, and no error."""
    backend = Hand(TEACHER)
    traces = [rollout(STUDENT, THINK, ended=False), rollout(STUDENT, THINK + "4", ended=False)]
    first, second = Teacher(backend, TEACHER, STUDENT, 2, asks=True).score(traces)
    assert len(backend.asked) == 1 and not any(known(first)) and known(second)[-1]
    assert first.scored.completion_token_ids == () and first.scored.prompt_token_ids


TEXTS = st.text(st.sampled_from("0123456789+-=. \n"), min_size=1, max_size=12)  # both tokenizers have these


@settings(max_examples=40)
@given(begins=st.booleans(), text=TEXTS, ended=st.booleans(), opens=st.booleans())
def test_known_positions_are_those_where_both_begin(opening, begins, text, ended, opens):
    """For a student whose template opens the reasoning and one whose does not, with a teacher that opens it: a position
    is known where a token of each begins, and the teacher was not given it in its prompt."""
    chat = opening if opens else STUDENT
    full = (THINK if begins or opens else "") + text
    written = rollout(chat, full, ended)
    backend = Hand(TEACHER)
    teacher = Teacher(backend, TEACHER, chat, 2, asks=True)
    taught = teacher.score([written])[0]
    given = len(THINK) if full.startswith(THINK) and not opens else 0  # of the student's text, in the teacher's prompt
    starts = positions(teacher, TEACHER, taught.scored.completion_token_ids, given)
    offset, expected = 0, []
    lengths = [len(teacher.projector.teacher.piece(id_)) for id_ in taught.scored.completion_token_ids]
    ends = {start + lengths[i] for start, i in starts.items()} | {given}
    for id_ in written.trace.completion_token_ids:
        size = 0 if id_ in chat.stop_token_ids else len(teacher.projector.student.piece(id_))
        i = starts.get(offset)
        longer = i is not None and size and lengths[i] >= size
        expected.append(i is not None and (not size or longer or offset + size in ends))
        offset += size
    for place, (is_known, wanted) in enumerate(zip(known(taught), expected, strict=True)):
        if is_known:
            assert place < len(expected) and wanted, (place, full)
    exact = [place for place, wanted in enumerate(expected) if wanted]
    own = {p: math.exp(sum(masses(taught.distribution, p).values())) for p in exact if known(taught)[p]}
    assert all(0 < value <= 1 for value in own.values())
    assert not ended or known(taught)[-1], "the end of a turn is known"
