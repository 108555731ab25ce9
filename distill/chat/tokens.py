"""Control tokens belong to the template: in a message they are plain text.

A reasoner that writes about templates ("a turn ends with <|im_end|>") must not teach a student to end its turn there,
and a question must not be able to open a turn of its own. So in every message the control tokens are encoded as text:
those that the tokenizer marks as special, the added ones that the template itself writes, and the end tokens. `<think>`
and `</think>` are part of the format and stay tokens, wherever they stand.

Messages without a control token, nearly all, are encoded as ever, so nothing changes for them. For the others:

1. In the messages every control token is replaced by a stand-in, one private character a token, and the conversation is
   rendered. What still is a control token in the rendered text was written by the template.
2. The text is encoded by a copy of the tokenizer in which the control tokens have other names, again private
   characters: the template's own are written by those names, the stand-ins are written out. One encoding of the whole
   text keeps everything else (normalisation, spaces, merges) as the tokenizer does it.

Rejected: encoding the text in pieces around the tokens (`sanitize_control_tokens` of transformers), because tokenizers
of SentencePiece's kind put a space before every piece, and `split_special_tokens`, which leaves `<｜User｜>` of
DeepSeek, an added token that is not a special one, as it is.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from distill.errors import UserError
from distill.prompts.prompt import END_THINK, THINK, Message

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerBase

NAMES, STAND_INS = 0xF0000, 0x100000  # the private-use planes of Unicode: 65,534 characters each


class ControlTokens:
    """The control tokens of one tokenizer with one template."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", where: str, written: Iterable[str], ends: Sequence[int]
    ) -> None:
        """where: its name in messages. written: the texts that the template can write. ends: ids of the end tokens."""
        self.tokenizer = tokenizer
        self.where = where
        texts = "\0".join(written)
        self.ids = {
            token.content: number
            for number, token in tokenizer.added_tokens_decoder.items()
            if token.content not in (THINK, END_THINK)
            and not token.content.isspace()
            and (token.special or token.content in texts or number in ends)
        }
        longest_first = sorted(self.ids, key=len, reverse=True)
        self._numbers = {token: number for number, token in enumerate(longest_first)}
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._beginnings = {token[:2] for token in longest_first}

    def inside(self, text: str) -> bool:
        """Whether the tokenizer would find a control token in a text."""
        if any(start in text for start in self._beginnings) and self._pattern.search(text) is not None:
            return True
        return self._normalizer is not None and self._pattern.search(self._normalizer.normalize_str(text)) is not None

    def replaced(self, text: str) -> str:
        """The text with a stand-in for every control token. Errors: UserError when it has private characters itself."""
        if text and ord(max(text)) >= NAMES:
            raise self._refusal()
        return self._pattern.sub(lambda match: chr(STAND_INS + self._numbers[match[0]]), text)

    def replaced_in(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with stand-ins for their control tokens. Errors: UserError."""
        return [{"role": message["role"], "content": self.replaced(message["content"])} for message in messages]

    def encode(self, text: str) -> list[int]:
        """Encode a text with stand-ins; the control tokens in it are the template's.

        Errors: UserError when the tokenizer encodes something else as a control token, or cannot be copied.
        """
        if self._copy is None:
            raise self._refusal()
        renamed, numbers = self._copy
        template_only = self._pattern.sub(lambda match: chr(NAMES + self._numbers[match[0]]), text)
        written = template_only.translate(dict(zip(self._stand_ins, self._numbers, strict=True)))
        ids = [numbers.get(number, number) for number in renamed.encode(written, add_special_tokens=False).ids]
        control = set(self.ids.values())
        if sum(number in control for number in ids) != sum(NAMES <= ord(c) < STAND_INS for c in template_only):
            raise self._refusal()
        return ids

    @cached_property
    def _normalizer(self) -> "Normalizer | None":
        """What the tokenizer does to a text before it looks for control tokens; None where that changes nothing."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        normalizer: Normalizer | None = getattr(backend, "normalizer", None)
        tokens = (token for token in self.tokenizer.added_tokens_decoder.values() if token.content in self.ids)
        if normalizer is None or not any(token.normalized for token in tokens):
            return None
        settings = json.loads(backend.to_str())["normalizer"] if backend is not None else None
        return None if settings == {"type": "Sequence", "normalizers": []} else normalizer

    @property
    def _stand_ins(self) -> range:
        return range(STAND_INS, STAND_INS + len(self._numbers))

    @cached_property
    def _copy(self) -> "tuple[Tokenizer, dict[int, int]] | None":
        """The tokenizer with other names for its control tokens, and its ids → the original's where they differ.

        None for a tokenizer that is not one of the `tokenizers` library.
        """
        from tokenizers import Tokenizer

        original = getattr(self.tokenizer, "backend_tokenizer", None)
        if not isinstance(original, Tokenizer):
            return None
        names = {token: chr(NAMES + number) for token, number in self._numbers.items()}
        settings = json.loads(original.to_str())
        settings |= {"post_processor": None, "truncation": None, "padding": None}
        for token in settings["added_tokens"]:
            token["content"] = names.get(token["content"], token["content"])
        model = settings["model"]
        vocabulary = model["vocab"]  # a control token may stand in it too, and then the model would write it itself
        if isinstance(vocabulary, dict):
            model["vocab"] = {names.get(piece, piece): number for piece, number in vocabulary.items()}
        else:
            model["vocab"] = [[names.get(piece, piece), score] for piece, score in vocabulary]
        if "merges" in model:
            merges = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
            model["merges"] = [pair for pair in merges if not {*pair, "".join(pair)} & names.keys()]
        copy = Tokenizer.from_str(json.dumps(settings))
        tokens = {name: token for token, name in names.items()}
        added = original.get_added_tokens_decoder()
        numbers = {token.content: number for number, token in added.items()}
        copied = copy.get_added_tokens_decoder()
        return copy, {number: numbers[tokens.get(t.content, t.content)] for number, t in copied.items()}

    def _refusal(self) -> UserError:
        return UserError(
            f"a message holds a control token of the tokenizer of {self.where}, which cannot encode it as plain text; "
            f"remove {', '.join(list(self.ids)[:4])} and the like from the prompts and traces"
        )
