"""The tags that models put around a reasoning in a text → `<think>…</think>`.

A known opening tag at the beginning of a text, after a token that begins a sequence, opens a reasoning; so does one
after a first sentence ("Sure. [THINK]…"). A closing tag without an opening one closes a reasoning whose opening tag was
in the prompt. A text that only mentions a tag stays as it is. A tag that looks like one of a reasoning and is in no
table leaves the answer out: with the reasoning in it, the answer would be graded and trained on.
"""

import re

from distill.chat import END_THINK, THINK

TAGS = (  # around a reasoning: opening, closing; around the answer after it: opening, closing
    ("<|begin_of_thought|>", "<|end_of_thought|>", "<|begin_of_solution|>", "<|end_of_solution|>"),  # OpenThoughts
    ("◁think▷", "◁/think▷", "", ""),  # Kimi
    ("[THINK]", "[/THINK]", "", ""),  # Magistral
    ("<thinking>", "</thinking>", "<answer>", "</answer>"),
    ("<thought>", "</thought>", "<Output>", "</Output>"),  # Marco-o1
    ("<reasoning>", "</reasoning>", "<answer>", "</answer>"),
    ("<seed:think>", "</seed:think>", "", ""),  # Seed-OSS
    ("<|START_THINKING|>", "<|END_THINKING|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),  # Command A Reasoning
    (THINK, END_THINK, "", ""),  # in another case
)
BEGIN = re.compile(r"(?:<s>|<bos>|<\|begin_of_text\|>|<\|startoftext\|>|<｜begin▁of▁sentence｜>)\s*")
END = re.compile(
    r"\s*(?:</s>|<\|im_end\|>|<\|eot_id\|>|<\|endoftext\|>|<\|END_OF_TURN_TOKEN\|>|<｜end▁of▁sentence｜>)$"
)
SENTENCE = re.compile(r"(?:^|[.!?:]|\n)\s*$")  # before an opening tag that is more than a mention
CHANNELS = re.compile(  # of gpt-oss
    r"(?:<\|start\|>assistant)?<\|channel\|>(?P<channel>\w+)(?P<to>[^<]*)(?:<\|constrain\|>[^<]*)?<\|message\|>"
    r"(?P<text>.*?)(?:<\|(?:end|return|call)\|>|\Z)",
    re.DOTALL,
)
UNKNOWN = re.compile(r"<([^<>\s/]{0,20}(?:think|thought|reason)[^<>\s]{0,20})\s*>", re.IGNORECASE)

Parts = tuple[str, str]  # reasoning and response


class LeftOut(Exception):
    """The reason for which an answer cannot be used."""


def tagged(text: str) -> tuple[str, Parts | None]:
    """The text, stripped, with the tags of a publisher around its reasoning as think tags; and its (reasoning,
    response), None where the text has no such tags.

    The first closing tag ends the reasoning, as in `split_reasoning`: an answer may mention the tag. Errors: LeftOut,
    for tools and unknown tags.
    """
    text = text.strip()
    bare = BEGIN.sub("", text, count=1) if BEGIN.match(text) else text
    if bare.startswith(THINK):
        return bare, None
    if CHANNELS.match(bare):
        return _channels(bare)
    for opening, closing, *around in TAGS:
        if bare[: len(opening)].casefold() == opening.casefold():
            thought, closed, response = _partition(bare[len(opening) :], closing)
            if not closed:
                return THINK + thought, None  # cut off while it thinks
            return _divided(thought, END.sub("", response), *around)
    if END_THINK not in text:
        for opening, closing, *around in TAGS:
            head, closed, response = _partition(bare, closing)
            before, opened, thought = _partition(head, opening)
            if closed and re.search(r"\w", response) and (not opened or SENTENCE.search(before)):
                return _divided(before + thought, END.sub("", response), *around)
    if (unknown := UNKNOWN.match(bare)) and f"</{unknown[1]}" in bare:
        raise LeftOut(f"unknown tag {unknown[0]}")
    return text, None


def _partition(text: str, tag: str) -> tuple[str, str, str]:
    """The text before a tag in any case, the tag ("" where there is none), and the text after it."""
    match = re.search(re.escape(tag), text, re.IGNORECASE)
    return (text[: match.start()], match[0], text[match.end() :]) if match else (text, "", "")


def _divided(thought: str, response: str, opening: str, closing: str) -> tuple[str, Parts]:
    """The text with think tags, and its parts. opening, closing: around the answer."""
    if opening and response.lstrip().startswith(opening):
        response = "\n\n" + response.lstrip().removeprefix(opening).strip().removesuffix(closing).strip()
    return f"{THINK}{thought}{END_THINK}{response}".strip(), (thought.strip(), response.strip())


def _channels(text: str) -> tuple[str, Parts | None]:
    """An answer of gpt-oss: its channel `analysis` is the reasoning, `final` the answer."""
    messages = list(CHANNELS.finditer(text))
    if any("to=" in message["to"] or message["channel"] == "commentary" for message in messages):
        raise LeftOut("turns of tools")
    thought, response = (
        "\n".join(message["text"].strip() for message in messages if message["channel"] == channel)
        for channel in ("analysis", "final")
    )
    if not any(message["channel"] == "final" for message in messages):
        return THINK + thought, None
    return f"{THINK}\n{thought}\n{END_THINK}\n\n{response}", (thought, response)
