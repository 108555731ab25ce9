"""The gate of learning from rollouts: before the first step, prove on real rollouts that the training is the intended
one.

Distillation on the student's own text fails silently where teacher and student are not asked the same: a template that
leaves out the system prompt, a thinking block that only one of them has open, an end token that the other does not
know. The loss falls all the same. So the first rollouts are read back from their token ids, once as the student sampled
them and once as the teacher scored them, and compared span by span: the content of every message in the prompt, then
the completion. The frames around the contents belong to the templates and differ; words that only one of them adds
(a default system prompt, a date) are reported.

Agreement of texts is not enough: a student may end its turns with a token that the teacher would never write there. So
the probabilities of both at the student's own tokens are compared, too (`agreement`).

What is known without rollouts is refused before any is sampled: `check_lengths`, `check_student`, `check_teacher`.
`grpo` has no teacher and calls `prove_rollouts` alone.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from distill.chat import END_THINK, THINK, Chat
from distill.errors import UserError
from distill.prompts.prompt import Message
from distill.traces.trace import Trace
from distill.train.rollouts.agreement import Distribution, compare, tokens_text
from distill.train.rollouts.questions import Questions
from distill.train.rollouts.rewards import is_truncated
from distill.train.rows.align import token_bytes
from distill.train.rows.gate import REMEDY, name, squash

MAX_NEW = "train.objective.rollouts.sampling.max_new_tokens"
STALE = "the files in rollouts/ belong to another tokenizer or chat template: start again with --fresh train"
ADDED = 2  # words that a template adds, from which on they are a text and not a role
ROLES = {"system", "user", "assistant", "human", "developer", "model"}


# ---- before the first rollout


def check_lengths(questions: Questions, max_new_tokens: int, limits: Mapping[str, int]) -> None:
    """Refuse prompts whose rollouts may exceed a limit. limits: name of each in messages → tokens. A teacher with
    another tokenizer has questions of its own. Errors: UserError."""
    whose, limit = min(limits.items(), key=lambda item: item[1])
    lengths = questions.lengths
    if not lengths:
        return
    longest = int(np.argmax(lengths))
    if (room := limit - lengths[longest]) < max_new_tokens:
        remedy = f"set {MAX_NEW} to at most {room:,}" if room > 0 else "leave such prompts out"
        raise UserError(
            f"{MAX_NEW}: prompt {questions.prompts[longest].id} has {lengths[longest]:,} tokens, and a rollout of "
            f"{max_new_tokens:,} more exceeds {whose} of {limit:,} tokens; {remedy}"
        )


def check_student(chat: Chat) -> None:
    """Refuse a template that does not end a turn with a token that stops generation. Errors: UserError, also where the
    template does not render a turn that begins with its prompt."""
    ids, _ = chat.training_ids([{"role": "user", "content": "q"}, {"role": "assistant", "content": chat.restore("a")}])
    if ids[-1] not in chat.stop_token_ids:
        raise UserError(
            f"the chat template of {chat.where} closes an assistant's turn without a token that stops generation, so "
            f"no rollout could end; {REMEDY}"
        )


def check_teacher(student: Chat, teacher: Chat) -> None:
    """Refuse tokenizers whose tokens cannot be aligned by their bytes. Errors: UserError."""
    token_bytes(student.tokenizer, student.where)
    token_bytes(teacher.tokenizer, teacher.where)


# ---- on rollouts


def prove_rollouts(rollouts: Sequence[Trace], student: Chat) -> tuple[str, ...]:
    """Prove that rollouts are what the student is asked and wrote; return lines that say so.

    Errors: UserError if a rollout's tokens are not those of its prompt and text, one ended without an end token, or all
    were cut off.
    """
    assert rollouts, "the gate reads at least one rollout"
    for trace in rollouts:
        if list(trace.prompt_token_ids) != student.prompt_ids(trace.prompt.messages):
            raise UserError(
                f"rollout {name(trace.key)} does not begin with the prompt that the chat template of {student.where} "
                f"renders; {STALE}"
            )
        if student.restore(student.decode(trace.completion_token_ids)) != trace.text:
            raise UserError(
                f"rollout {name(trace.key)}: its tokens decode to another text with the tokenizer of {student.where}; "
                f"{STALE}"
            )
    ended = [trace for trace in rollouts if not is_truncated(trace)]
    for trace in ended:
        if not trace.completion_token_ids or trace.completion_token_ids[-1] not in student.stop_token_ids:
            raise UserError(
                f"rollout {name(trace.key)} ended ({trace.finish_reason}) without an end token of {student.where} "
                f"({tokens_text(student, student.stop_token_ids)}), so the student would not learn to end there; "
                f"{REMEDY}"
            )
    if not ended:
        tokens = max(trace.tokens for trace in rollouts)
        raise UserError(
            f"all {len(rollouts):,} rollouts were cut off at {tokens:,} tokens, so the student has no answer to learn "
            f"from; raise {MAX_NEW}, or teach it to end first (a cold start by `sft`, see train.phases)"
        )
    counts = Counter(trace.completion_token_ids[-1] for trace in ended)
    endings = ", ".join(f"{count:,} with {tokens_text(student, [id_])}" for id_, count in counts.most_common())
    mean = fmean(trace.tokens for trace in rollouts)
    return (
        f"rollout gate: {len(rollouts):,} rollouts, mean {mean:,.0f} tokens, equal to the student's prompts and texts",
        f"  truncated: {len(rollouts) - len(ended):,} of {len(rollouts):,} ({1 - len(ended) / len(rollouts):.0%})",
        f"  end of turn: {endings}",
    )


def prove_teacher(
    rollouts: Sequence[Trace],
    scored: Sequence[Trace],
    distributions: Sequence[Distribution],
    student: Chat,
    teacher: Chat,
) -> tuple[str, ...]:
    """Prove that the teacher is asked what the student was; return lines that say so, warnings among them.

    scored: the rollouts with the prompt and completion ids that the teacher was asked (`Backend.score`). distributions:
    the teacher's, at each token of the student's completions; −∞ is not known. Errors: UserError if the teacher reads
    another conversation, none of the rollouts as it was written, or none ends in the token that the teacher's end is
    aligned to.
    """
    assert len(rollouts) == len(scored) == len(distributions) > 0
    lines = []
    for trace, theirs in zip(rollouts, scored, strict=True):
        _prove_contents(trace, theirs, student, teacher)
    lines += _added(rollouts[0], scored[0], student, teacher)
    lines += _prove_completions(rollouts, scored, teacher)
    lines += _prove_ends(rollouts, student, teacher)
    return (*lines, *compare(rollouts, distributions, student, teacher))


def _prove_contents(trace: Trace, theirs: Trace, student: Chat, teacher: Chat) -> None:
    """Both prompts contain the same messages, in order."""
    ours_found, _ = _contents(trace.prompt.messages, _text(student, trace.prompt_token_ids))
    theirs_found, _ = _contents(trace.prompt.messages, _text(teacher, theirs.prompt_token_ids))
    for message, ours, other in zip(trace.prompt.messages, ours_found, theirs_found, strict=True):
        if ours != other:
            reads, lacks = (student, teacher) if ours else (teacher, student)
            what = f"{message['role']} message {_shown(message['content'])}"
            raise UserError(
                f"prompt {trace.prompt.id}: the chat template of {lacks.where} leaves out or changes the {what}, and "
                f"that of {reads.where} keeps it, so teacher and student are not asked the same; set "
                f"train.chat_template or teacher_template to one that keeps it, or leave such "
                f"prompts out"
            )


def _contents(messages: Sequence[Message], text: str) -> tuple[list[bool], str]:
    """Whether each message's content is in a rendered prompt, in order; and the text without them."""
    rest, place, rendered = "", 0, squash(text)
    kept = []
    for message in messages:
        content = squash(message["content"])
        at = rendered.find(content, place)
        kept.append(at >= 0)
        if at >= 0:
            rest += rendered[place:at] + " "
            place = at + len(content)
    return kept, rest + rendered[place:]


def _added(trace: Trace, theirs: Trace, student: Chat, teacher: Chat) -> list[str]:
    """A warning where one template adds words to a prompt that the other does not."""
    frames = [(student, _frame(trace, trace, student)), (teacher, _frame(trace, theirs, teacher))]
    words = [[word for word in re.findall(r"[^\W_]{2,}", frame) if word.lower() not in ROLES] for _, frame in frames]
    return [
        f"warning: the chat template of {chat.where} adds words to the prompt that the other one does not: "
        f"{_shown(frame)}"
        for (chat, frame), added in zip(frames, words, strict=True)
        if len(added) >= ADDED and words[0] != words[1]
    ]


def _frame(trace: Trace, asked: Trace, chat: Chat) -> str:
    """What a template adds to the messages of a prompt, without control tokens."""
    _, frame = _contents(trace.prompt.messages, _text(chat, asked.prompt_token_ids))
    control = sorted((token.content for token in chat.tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
    for token in (*control, THINK, END_THINK):
        frame = frame.replace(squash(token), " ") if token.strip() else frame
    return frame


def _prove_completions(rollouts: Sequence[Trace], scored: Sequence[Trace], teacher: Chat) -> list[str]:
    """The teacher reads each completion as it was written. A template that opens the reasoning is asked without its
    opening where the student's text does not begin with it (`Chat.prompt_ids_of`)."""
    opened = [_text(teacher, theirs.prompt_token_ids).endswith(teacher.prefill) for theirs in scored]
    read = [
        (teacher.prefill if open_ else "") + teacher.decode(theirs.completion_token_ids)
        for open_, theirs in zip(opened, scored, strict=True)
    ]
    changed = [i for i, trace in enumerate(rollouts) if squash(read[i]) != squash(trace.text)]
    if changed:
        trace, text = rollouts[changed[0]], read[changed[0]]
        what = (
            f"{len(changed):,} of {len(rollouts):,} rollouts are another text for the teacher: its prompt or the "
            f"tokenizer of {teacher.where} changes it (rollout {name(trace.key)}: {_shown(text)} instead of "
            f"{_shown(trace.text)}); use a teacher whose tokenizer keeps the text"
        )
        if len(changed) == len(rollouts):
            raise UserError(what)
        return [f"warning: {what}"]
    lines = [f"  teacher: asked exactly the student's prompts and texts ({teacher.where})"]
    if closed := opened.count(False):
        lines.append(
            f"  {closed:,} of {len(rollouts):,} do not begin with {teacher.prefill!r}, which the teacher's template "
            f"opens; it is asked without that there"
        )
    return lines


def _prove_ends(rollouts: Sequence[Trace], student: Chat, teacher: Chat) -> list[str]:
    """Some rollouts end in the token that the end of the teacher's turns is aligned to."""
    end = student.stop_token_ids[-1]
    ended = [trace for trace in rollouts if not is_truncated(trace)]
    others = [trace for trace in ended if trace.completion_token_ids[-1] != end]
    if not others:
        theirs = tokens_text(teacher, teacher.stop_token_ids)
        return [f"  end of turn: {tokens_text(student, [end])} stands for the teacher's {theirs}"]
    token = tokens_text(student, [others[0].completion_token_ids[-1]])
    what = (
        f"{len(others):,} of {len(ended):,} rollouts that ended did so with {token}, and the chat template of "
        f"{student.where} ends a turn with {tokens_text(student, [end])}, so the teacher cannot say when to end"
    )
    remedy = (
        "begin with a cold start by `sft` (train.phases), or use a template that ends turns so: train.chat_template"
    )
    if len(others) == len(ended):
        raise UserError(f"{what}; {remedy}")
    return [f"warning: {what} there"]


def _text(chat: Chat, ids: Sequence[int]) -> str:
    """The text of a prompt's tokens, control tokens included."""
    return str(chat.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _shown(text: str) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= 60 else f"{flat[:57]}…")
