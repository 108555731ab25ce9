"""What a teacher says at the student's tokens: with its own tokenizer, with another, and where templates open the
reasoning."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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
from distill.train.rollouts.teachers import Teacher, within
from distill.train.rows.align import byte_symbols

DIRECTORY = resolve_weights("student", "tiny-qwen")
STUDENT, TEACHER = Chat.load(DIRECTORY), teacher_of("teacher", "tiny-r1").chat
PROMPT = Prompt.from_question("What is 20 + 22?", "42")
THINK = "<think>\n"
MANY = 1 << 20  # rows of an embedding: more than any tokenizer here has tokens
OPENED = """{%- for m in messages -%}
{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif -%}"""


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

    def __init__(self, chat, vocab_size=MANY):
        self.chat, self.vocab_size, self.asked = chat, vocab_size, []

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
        taught = Teacher(backend, STUDENT, STUDENT, MANY, 6, asks=True).score([written])[0]
        assert written.likeliest is not None
        scored = backend.score([trace], 6, [written.likeliest])[0]
    assert taught.scored.completion_token_ids == trace.completion_token_ids and all(known(taught))
    for place, top in enumerate(scored.top_logprobs):
        said = masses(taught.distribution, place)
        expected = dict(top) | {trace.completion_token_ids[place]: scored.logprobs[place]}
        assert said == pytest.approx(expected, abs=1e-5)
        assert {5, 9, *STUDENT.stop_token_ids} <= said.keys()


@pytest.mark.parametrize("directory", ["tiny-qwen", "tiny-r1"])
def test_ids_that_only_the_student_has_a_row_for_are_not_asked_for(directory):
    """Models of one tokenizer pad their embeddings differently; and a tokenizer may have more tokens than rows."""
    chat = Chat.load(resolve_weights("student", "tiny-qwen"))
    model = teacher_of("teacher", "tiny-r1") if directory == "tiny-r1" else Model("teacher", DIRECTORY)
    with backends.open(model, LocalEngine(dtype="float32")) as backend:
        size = backend.vocab_size
        written = rollout(chat, "The answer is 42.", top=(5, size, size + 7))
        taught = Teacher(backend, model.chat, chat, size + 8, 6, asks=True).score([written])[0]
    said = masses(taught.distribution, 0)
    assert said and max(said) < size and (model.chat.where != chat.where or 5 in said)


def test_ids_that_only_the_teacher_has_a_row_for_are_of_the_tail():
    text, size = "The answer is 42.", len(STUDENT.tokenizer)
    written = rollout(STUDENT, text, top=(5, size + 2, 9))  # the backend lists what it is asked for
    taught = Teacher(Hand(STUDENT), STUDENT, STUDENT, size, 2, asks=True).score([written])[0]
    ids, logprobs = taught.distribution
    assert ids.max() < size and (logprobs[:, :2] > -np.inf).all(), "what is known comes first"
    for place, id_ in enumerate(written.trace.completion_token_ids):
        assert masses(taught.distribution, place).keys() == {5, 9, id_}


def test_a_distribution_without_the_ids_past_a_vocabulary_by_hand():
    ids = np.array([[12, 3, 10, 5], [1, 2, 3, 0]], np.int32)
    logprobs = np.array([[-0.5, -1, -2, -3], [-1, -2, -3, -np.inf]], np.float32)
    ids, logprobs = within((ids, logprobs), 10)
    assert ids.tolist() == [[3, 5, 0, 0], [1, 2, 3, 0]] and logprobs.dtype == np.float32
    assert logprobs.tolist() == [[-1, -3, -np.inf, -np.inf], [-1, -2, -3, -np.inf]]


# ---- two tokenizers


def test_positions_by_hand():
    """Tokens of the same bytes stand for each other; the student's candidates are asked for by the teacher's ids."""
    text = "The answer is 42."
    candidate = STUDENT.text_ids("4")[0]
    written = rollout(STUDENT, text, top=(candidate, STUDENT.stop_token_ids[-1]))
    backend = Hand(TEACHER)
    teacher = Teacher(backend, TEACHER, STUDENT, MANY, 2, asks=True)
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


def positions(teacher, chat, ids, offset, vocabulary=None):
    """Offset in the text → the token that begins there. vocabulary: by default the teacher's."""
    starts = {}
    for i, id_ in enumerate(ids):
        starts[offset] = i
        offset += 0 if id_ in chat.stop_token_ids else len((vocabulary or teacher.projector.teacher).piece(id_))
    return starts


@pytest.mark.parametrize("ended", [True, False])
def test_a_rollout_that_was_cut_off_is_scored_without_an_end(ended):
    backend = Hand(TEACHER)
    taught = Teacher(backend, TEACHER, STUDENT, MANY, 2, asks=False).score(
        [rollout(STUDENT, "The answer is 4", ended)]
    )[0]
    assert (backend.asked[0][-1] == TEACHER.stop_token_ids[-1]) == ended
    assert TEACHER.decode(backend.asked[0]) == "The answer is 4" and all(known(taught)[:1])


@pytest.mark.parametrize("text", ["5 \N{OHM SIGN} and", THINK + "5 \N{ANGSTROM SIGN}"])
@pytest.mark.parametrize("ended", [True, False])
def test_a_rollout_that_the_teachers_tokenizer_normalises_is_scored(text, ended):
    """Up to the first difference, cut off or not: what the teacher reads has another text than the rollout."""
    model = Model("teacher", DIRECTORY)
    written = rollout(TEACHER, text, ended, top=(5, 9))
    with backends.open(model, LocalEngine(dtype="float32")) as backend:
        taught = Teacher(backend, STUDENT, TEACHER, MANY, 2, asks=True).score([written])[0]
    read = taught.scored.completion_token_ids
    assert STUDENT.decode(read) != text and (read[-1] in STUDENT.stop_token_ids) == ended
    assert known(taught)[0] and not known(taught)[-1]


def test_nothing_of_the_teacher_is_known_of_its_own_opening():
    """The student was cut off after what the teacher's template opens: there is nothing to score, and no error."""
    backend = Hand(TEACHER)
    traces = [rollout(STUDENT, THINK, ended=False), rollout(STUDENT, THINK + "4", ended=False)]
    first, second = Teacher(backend, TEACHER, STUDENT, MANY, 2, asks=True).score(traces)
    assert len(backend.asked) == 1 and not any(known(first)) and known(second)[-1]
    assert first.scored.completion_token_ids == () and first.scored.prompt_token_ids


ALPHABET = "01 "  # small, so that drawn merges are used
TEXTS = st.text(st.sampled_from(ALPHABET), min_size=3, max_size=14)


@st.composite
def chats(draw):
    """A byte-level tokenizer with its own merges and order, and a template that opens the reasoning or does not."""
    symbols = byte_symbols()
    known = [symbols[byte] for byte in ALPHABET.encode()]
    merges = []
    for _ in range(draw(st.sampled_from((0, 4, 12)))):
        pair = draw(st.sampled_from(known)), draw(st.sampled_from(known))
        if len("".join(pair)) <= 5 and "".join(pair) not in known:
            merges.append(pair)
            known.append("".join(pair))
    order = [*symbols, *known[len(ALPHABET) :]]
    if draw(st.booleans()):
        order.reverse()
    tokenizer = Tokenizer(models.BPE({token: id_ for id_, token in enumerate(order)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return Chat(fast, "drawn", None, OPENED if draw(st.booleans()) else OPENED.replace("<think>\\n", ""))


@settings(max_examples=100, deadline=None)
@given(begins=st.booleans(), text=TEXTS, ended=st.booleans(), ours=chats(), theirs=chats())
def test_known_positions_are_those_where_both_begin(begins, text, ended, ours, theirs):
    """Of any two tokenizers and templates: a position is known if and only if a token of each begins there, the
    teacher was not given it in its prompt, and no token of the teacher that begins inside the student's goes on after
    it."""
    full = (THINK if begins or ours.prefill else "") + text
    written = rollout(ours, full, ended)
    teacher = Teacher(Hand(theirs), theirs, ours, MANY, 2, asks=True)
    taught = teacher.score([written])[0]
    given = len(theirs.prefill) if full.startswith(THINK) else 0  # of the text, in the teacher's prompt
    start = len(ours.prefill)  # of the student's tokens
    starts = positions(teacher, theirs, taught.scored.completion_token_ids, given)
    lengths = [len(teacher.projector.teacher.piece(id_)) for id_ in taught.scored.completion_token_ids]
    ends = {at + lengths[i] for at, i in starts.items()}
    expected, offset = [], start
    for id_ in written.trace.completion_token_ids:
        size = 0 if id_ in ours.stop_token_ids else len(teacher.projector.student.piece(id_))
        i = starts.get(offset)
        longer = i is not None and size and lengths[i] >= size
        expected.append(i is not None and bool(not size or longer or offset + size in ends))
        offset += size
    assert known(taught) == expected
    totals = [math.exp(sum(masses(taught.distribution, place).values())) for place in range(len(expected))]
    assert all(0 < total <= 1 for total in totals)
    assert not ended or known(taught)[-1], "the end of a turn is known"


@settings(max_examples=40, deadline=None)
@given(text=TEXTS, ours=chats(), theirs=chats(), data=st.data())
def test_the_teacher_is_asked_for_the_tokens_with_the_bytes_of_the_students(text, ours, theirs, data):
    """At each token of the teacher that begins where one of the student's does, for the tokens with the same bytes as
    the student's likeliest ones there, and at the others for none."""
    full = ours.prefill + text
    size = len(ours.tokenizer)
    likeliest = [data.draw(st.lists(st.integers(0, size + 3), min_size=3, max_size=3)) for _ in range(len(text) + 1)]
    trace = rollout(ours, full).trace
    ids = np.array(likeliest[: len(trace.completion_token_ids)], np.int32)
    asked = []
    backend = Hand(theirs)
    scored = backend.scored
    backend.scored = lambda traces, top_k, ids=None: asked.extend(ids) or scored(traces, top_k, ids)
    teacher = Teacher(backend, theirs, ours, MANY, 2, asks=True)
    read = teacher.score([Rollout(trace, ids)])[0].scored.completion_token_ids
    if teacher.same_tokens and read == trace.completion_token_ids:
        assert (asked[0] == ids).all()
        return
    our_starts = positions(teacher, ours, trace.completion_token_ids, len(ours.prefill), teacher.projector.student)
    given = len(theirs.prefill) if full.startswith(THINK) else 0
    for at, i in positions(teacher, theirs, read, given).items():
        wanted = ids[our_starts[at]].tolist() if at in our_starts else []
        expected = [same_text(id_, ours, theirs, teacher) for id_ in wanted]
        assert {id_ for id_ in asked[0][i].tolist() if id_ >= 0} == {id_ for id_ in expected if id_ is not None}


def same_text(id_, ours, theirs, teacher):
    """The teacher's token that ends a turn, or has the bytes of a student's token; None for none."""
    if id_ in ours.stop_token_ids:
        return theirs.stop_token_ids[-1]
    piece = teacher.projector.student.piece(id_)
    pieces = teacher.projector.teacher.pieces
    return pieces.index(piece) if piece and piece in pieces else None
