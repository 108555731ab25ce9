"""The conversation that a row asks: a text, a list of messages, or ShareGPT's turns.

A conversation ends with the question. Turns after the last one of the user, which are somebody's answer to it, are cut
off: asked with them, the teacher would continue or copy that answer, and the trace would hold what it should find. How
many conversations lost such turns is counted. Earlier answers are context and stay.

A content may be text or a list of text parts. A list may be kept as JSON text.
"""

from collections.abc import Sequence

from distill.errors import UserError
from distill.prompts.columns import first_of, parsed
from distill.prompts.prompt import Message

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
}
TEXT_PARTS = ("text", "input_text", "output_text")


def turns_of(question: object) -> list[object] | None:
    """The turns of a question that is a conversation, or one as JSON text; None for a plain text."""
    if isinstance(question, list):
        return question
    turns = parsed(question)
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and _has_role(turn) for turn in turns):
        return turns
    return None


def conversation(turns: Sequence[object], column: str, where: str) -> tuple[list[Message], int]:
    """The messages up to the last question, and how many turns after it were cut off. Errors: UserError."""
    roles = [_role(turn, column, where) for turn in turns]
    if "user" not in roles:
        raise UserError(f"{where}: column {column} has no message of the user; correct or remove the row")
    end = len(roles) - roles[::-1].index("user")
    messages = list[Message]()
    for role, turn in zip(roles[:end], turns, strict=False):
        assert isinstance(turn, dict)
        key = "content" if turn.get("content") is not None or "value" not in turn else "value"
        messages.append({"role": role, "content": asked_text(_joined(turn.get(key)), f"{column}.{key}", where)})
    return messages, len(roles) - end


def _has_role(turn: dict[str, object]) -> bool:
    return ("role" in turn and "content" in turn) or ("from" in turn and "value" in turn)


def _role(turn: object, column: str, where: str) -> str:
    role = first_of(turn, "role", "from") if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES:
        what = f"a turn of role {role!r}" if isinstance(turn, dict) else f"a {type(turn).__name__}"
        raise UserError(
            f"{where}: column {column} is a list, but not of messages: it holds {what}; expected `role` and `content`, "
            f"or `from` and `value`, with a role of {', '.join(ROLES)}"
        )
    return ROLES[role]


def _joined(content: object) -> object:
    """The text of a list of text parts; anything else as it is."""
    if not isinstance(content, list) or not content:
        return content
    texts = list[str]()
    for part in content:
        text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else part
        if not isinstance(text, str):
            return content
        texts.append(text)
    return "".join(texts)


def asked_text(value: object, column: str, where: str) -> str:
    """The text of a column that is asked. Errors: UserError when it is none, empty, or damaged."""
    if not isinstance(value, str):
        problem = "is empty" if value is None else f"is not text but {type(value).__name__}"
    else:
        problem = wrong_text(value) or ("" if value.strip() else "is blank" if value else "is empty")
    if problem:
        raise UserError(f"{where}: column {column} {problem}; correct or remove the row")
    assert isinstance(value, str)
    return value


def wrong_text(text: str) -> str | None:
    """What no tokenizer takes, or no author means, in a text; None where there is nothing."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return "holds half a surrogate pair, which no tokenizer takes"
    control = next((c for c in text if (c < " " and c not in "\t\n\r") or c == "\x7f"), None)
    if control is None:
        return None
    latex = " (LaTeX in JSON needs two backslashes: \\\\frac)" if control in "\b\f" else ""
    return f"holds the control character U+{ord(control):04X}{latex}"
