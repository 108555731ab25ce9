"""The Prompt: a question, its task, and what a grader needs to know of the answer.

Plain dataclasses, no pydantic: the maintainers' tools import the procedural generators on machines that have only
torch. The id is a hash of the content, so the same question read from two files is the same prompt, and a ledger stays
valid when files are reordered.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Literal, TypedDict

Task = Literal["math", "code", "choice", "instructions", "judge", "chat", "gym"]
THINK, END_THINK = "<think>", "</think>"  # around the reasoning in an assistant's message
BLOCK = re.compile(  # a think block, or a piece of code, in which a tag is text
    r"(?P<code>^[ \t]*(```+|~~~+).*?(?:^[ \t]*\2[ \t]*$|\Z)|`[^`\n]+`)|<think>.*?(?:</think>|\Z)",
    re.MULTILINE | re.DOTALL,
)
DOUBLED = re.compile(r"\A(?:\s*</think>)+")  # a block that is closed twice


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Split a completion into (reasoning, response), both stripped of surrounding white space.

    One rule holds wherever reasoning and answer are in one text: **the first `</think>` ends the reasoning**. vLLM's
    and SGLang's reasoning parsers, `distill serve` (which streams, and cannot wait for a later tag) and the thinking
    budget of the local engine do the same, so all of them split a completion alike. An answer that
    mentions `</think>` stays whole; a reasoning that mentions it loses its end to the answer, which `filter.format`
    rejects as `several_blocks`. Without `<think>` at the beginning the reasoning is all that stands before the tag: the
    prompt had opened the block. An empty block gives "". Reasoning is None when no block was closed, and then the
    response is the text before an open `<think>` (usually nothing) or, without any tag, the whole text.

    Where the rule applies, and where it does not:

    - sampled texts (local engine, a server without a reasoning parser) and published texts with think tags: here;
    - published texts with the tags of another model: `distill.traces.tags.tagged`, the same rule with those tags;
    - reasoning and answer in two fields, of a server or of a data set (`Completed.parts`, `layouts.Answer.parts`,
      the column `distill` of exported rows): never divided again, as nothing is left to guess;
    - graders read a response that was divided before, and leave out later think blocks: `outside_blocks`.
    """
    head, closed, response = text.partition(END_THINK)
    if not closed:
        return None, text.partition(THINK)[0].strip()
    before, opened, inside = head.partition(THINK)
    reasoning = inside if opened and not before.strip() else head
    return reasoning.strip(), response.strip()


def outside_blocks(response: str) -> str:
    """A response without think blocks: a model may think again after its first block, and a block may have no end.

    A `</think>` alone is a mention, but for a second one at the beginning; so is a tag in a piece of code: programs
    contain them. Linear time.
    """
    return BLOCK.sub(lambda match: match[0] if match["code"] else "", DOUBLED.sub("", response))


class Message(TypedDict):
    """One turn of a conversation. role: `system`, `user` or `assistant`."""

    role: str
    content: str


class PromptRow(TypedDict):
    """A prompt as a JSON object."""

    id: str
    messages: list[Message]
    task: Task
    answer: str | None
    source: str


@dataclass(frozen=True)
class Prompt:
    """One question. `answer` is the gold answer as text (None when unknown): for task `code` possibly the JSON text of
    `distill.prompts.code_tests`, for task `gym` that of `distill.prompts.gym`, for task `instructions` that of
    `distill.prompts.golds`. `source` names its file, data set or
    generator."""

    messages: tuple[Message, ...]
    task: Task = "math"
    answer: str | None = None
    source: str = ""
    id: str = field(default="")

    def __post_init__(self) -> None:
        if not self.id:
            object.__setattr__(self, "id", content_hash(self.messages, self.task, self.answer))

    @classmethod
    def from_question(cls, question: str, answer: str | None, task: Task = "math", source: str = "") -> "Prompt":
        """A prompt of one message by the user."""
        return cls(({"role": "user", "content": question},), task, answer, source)

    def to_dict(self) -> PromptRow:
        """The prompt as a JSON object."""
        return {
            "id": self.id,
            "messages": [{"role": m["role"], "content": m["content"]} for m in self.messages],
            "task": self.task,
            "answer": self.answer,
            "source": self.source,
        }

    @classmethod
    def from_dict(cls, row: PromptRow) -> "Prompt":
        """Read what `to_dict` gave."""
        messages: tuple[Message, ...] = tuple({"role": m["role"], "content": m["content"]} for m in row["messages"])
        return cls(messages, row["task"], row["answer"], row["source"], row["id"])


def content_hash(messages: tuple[Message, ...], task: str, answer: str | None) -> str:
    """16 hex digits (64 bits) of SHA-256 over the canonical JSON of what makes the prompt itself."""
    content = [[[m["role"], m["content"]] for m in messages], task, answer]
    text = json.dumps(content, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
