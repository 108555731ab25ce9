"""The Prompt: a question, its task, and what a grader needs to know of the answer.

Plain dataclasses, no pydantic: the maintainers' tools import the procedural generators on machines that have only
torch. The id is a hash of the content, so the same question read from two files is the same prompt, and a ledger stays
valid when files are reordered.
"""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Literal, TypedDict

Task = Literal["math", "code", "choice", "instructions", "judge", "chat", "gym"]
THINK, END_THINK = "<think>", "</think>"  # around the reasoning in an assistant's message


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
