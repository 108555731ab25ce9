"""Tokenizers and chat templates: no other room loads one.

Two templates matter to a reasoning model and they are not the same. The inference template of R1 keeps only what
follows the last `</think>` of earlier turns; used on training rows it deletes the very reasoning that should be
learnt. So training goes through `training_rows`, which renders the conversation whole and demands that it begins, token
for token, with the prompt that inference will use. A template that cannot do so is refused here, not discovered in a
score.

Where a template opens the thinking itself (`…<｜Assistant｜><think>\\n`) a completion has only the closing tag;
`prefill` says what was opened, and `Chat.restore` puts it back, so that stored text always has both tags.

Some checkpoints have two modes in one template and choose by a variable: `thinking` in DeepSeek-V3.1, `enable_thinking`
in Qwen3. Both names are passed, a template reads its own. Without thinking the prompt ends with the block closed
(`…<｜Assistant｜></think>`): nothing is open, nothing is put back, and the completion has no reasoning.

A file each: `loading` (what a model directory holds), `rendering` and `worker` (templates run in a bounded process),
`tokens` (control tokens inside a message are text).
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from distill.chat.loading import (
    TEMPLATES,
    TODAY,
    configured_ends,
    in_vocabulary,
    load_tokenizer,
    missing_tokens,
    own_template,
    read_template,
    reads_date,
    template_advice,
)
from distill.chat.rendering import RENDERER, Chats, TemplateError, Value
from distill.chat.tokens import ControlTokens
from distill.durable import write_whole
from distill.errors import UserError
from distill.prompts.prompt import END_THINK, THINK, Message, split_reasoning
from distill.thinking import LEVELS, Thinking, variables

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["END_THINK", "TEMPLATES", "THINK", "TODAY", "Chat", "read_template", "reads_date", "split_reasoning"]

TOGETHER = 256  # conversations that are rendered and tokenized together
PROBE: list[Message] = [{"role": "user", "content": "q"}]
SAVED_CLASS = "PreTrainedTokenizerFast"  # what transformers 4, vLLM and SGLang know TokenizersBackend as
OURS_ALONE = ("backend", "is_local", "local_files_only")  # keys of a saved tokenizer that say how it was loaded here


class Chat:
    """One tokenizer with one chat template, in one of its modes. thinking: None is the template's default.

    template: the text of the template; None takes the tokenizer's own. ends: ids that end a turn beside the tokenizer's
    own end token. Errors: UserError when there is no template, it does not render, or the tokenizer has no end token.
    """

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        where: str,
        thinking: Thinking | None = None,
        template: str | None = None,
        ends: Sequence[int] = (),
    ) -> None:
        chosen = template or own_template(tokenizer, where)
        if not chosen:
            raise UserError(f"{where} has no chat template; {template_advice(tokenizer, where)}")
        if tokenizer.eos_token_id is None:
            raise UserError(f"{where}/tokenizer_config.json names no eos_token: generation could never stop")
        self.tokenizer = tokenizer
        self.where = where
        self.template = chosen
        self._ends = in_vocabulary(tokenizer, ends)
        self._mode: dict[str, Value] = {}
        tokenizer.chat_template = chosen
        if thinking is not None:
            self._choose(thinking)
        else:
            self.prompt_text(PROBE)  # a template that cannot be rendered is refused now

    @classmethod
    def load(cls, model_dir: Path, template: str | None = None, thinking: Thinking | None = None) -> "Chat":
        """Load a model directory's tokenizer; `template` is a built-in name, a .jinja file, or None for its own.

        thinking: which of the template's modes, None for its default. Errors: UserError when a file is missing or
        damaged, the tokenizer lacks the tokens of a built-in template, or the template has only one mode.
        """
        ends = configured_ends(model_dir)  # first: transformers reads config.json too, and says less of a broken one
        tokenizer = load_tokenizer(model_dir)
        text = None
        if template is not None:
            text = read_template(template)
            if lacking := missing_tokens(tokenizer, template):
                raise UserError(
                    f"the chat template {template} writes {', '.join(lacking)}, which the tokenizer of {model_dir} "
                    f"does not have as tokens; {template_advice(tokenizer, str(model_dir))}"
                )
        return cls(tokenizer, str(model_dir), thinking, text, ends)

    def _choose(self, thinking: Thinking) -> None:
        level = isinstance(thinking, str)
        modes: list[Thinking] = [not thinking, *(other for other in LEVELS if level and other != thinking), thinking]
        prompts = []
        for mode in modes:  # the mode that stays comes last
            self._mode = {**variables(mode)}
            prompts.append(self.prompt_text(PROBE))
        if level and prompts[-1] == prompts[-2] != prompts[0]:
            raise UserError(
                f"the chat template of {self.where} has no levels of thinking: set `thinking: true` in the "
                f"teacher's card"
            )
        if prompts[-1] == prompts[0]:
            raise UserError(
                f"the chat template of {self.where} has one mode only, with or without thinking: "
                f"remove `thinking` from the teacher's card"
            )

    @property
    def advice(self) -> str:
        """What to set instead of this template, as the end of a message: templates that fit the tokenizer."""
        return template_advice(self.tokenizer, self.where)

    @property
    def eos_token_id(self) -> int:
        """The id of the tokenizer's own end token."""
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an assistant's turn; the last is the one that the template closes a turn with.

        The others are the tokenizer's end token and those of config.json and generation_config.json.
        """
        ids = self._encode(self._render([([*PROBE, {"role": "assistant", "content": "a"}], False)]))[0]
        special = {*self.tokenizer.all_special_ids, *self._ends}
        closing = [token for token in ids[-2:] if token in special]
        others = [token for token in (self.eos_token_id, *self._ends) if token not in closing]
        return tuple(dict.fromkeys([*others, *closing]))

    @cached_property
    def prefill(self) -> str:
        """What the generation prompt has already opened of the answer: `<think>\\n`, `<think>` or nothing."""
        text = self.prompt_text(PROBE)
        opening = text.rfind(THINK)
        return text[opening:] if opening >= 0 and not text[opening + len(THINK) :].strip() else ""

    def prompt_text(self, messages: Sequence[Message]) -> str:
        """The conversation as text, ready for the assistant's answer. Errors: UserError when it does not render."""
        return self._render([(messages, True)])[0]

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, ready for the assistant's answer. Errors: UserError."""
        return self._ids([(messages, True)])[0]

    def prompt_ids_of(self, messages: Sequence[Message], answer: str) -> list[int]:
        """Token ids of the conversation before a given answer: without the prefilled opening tag where the answer, with
        its reasoning, does not begin with it. Errors: UserError."""
        return next(self.prompts_ids_of([messages], [answer]))

    def prompts_ids_of(self, conversations: Iterable[Sequence[Message]], answers: Iterable[str]) -> Iterator[list[int]]:
        """`prompt_ids_of` of many conversations, one answer each, as `prompts_ids`."""
        opening = self.text_ids(self.prefill) if self.prefill else []
        for ids, answer in zip(self.prompts_ids(conversations), answers, strict=True):
            opened = bool(opening) and ids[-len(opening) :] == opening and not answer.startswith(self.prefill)
            yield ids[: -len(opening)] if opened else ids

    def prompts_ids(self, conversations: Iterable[Sequence[Message]]) -> Iterator[list[int]]:
        """`prompt_ids` of many conversations, TOGETHER at a time: rendering and tokenizing them so is much faster."""
        remaining = iter(conversations)
        while group := list(islice(remaining, TOGETHER)):
            yield from self._ids([(messages, True) for messages in group])

    def training_ids(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Token ids of the whole conversation, end of turn included, and how many of them are the prompt.

        The first part is exactly `prompt_ids(messages[:-1])`, and the rest ends at the token that closes the turn:
        white space that a template puts between turns is never sampled, so it is not trained.

        Errors: UserError when the template renders training text that does not begin with the inference prompt.
        """
        return self.training_rows([messages])[0]

    def training_rows(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], int]]:
        """`training_ids` of many conversations at once, which the tokenizer spreads over the cores."""
        assert all(messages[-1]["role"] == "assistant" for messages in conversations), "the last message is learnt"
        prompts = self._ids([(messages[:-1], True) for messages in conversations])
        wholes = self._ids([(messages, False) for messages in conversations])
        return [self._row(*row) for row in zip(conversations, prompts, wholes, strict=True)]

    def _row(self, messages: Sequence[Message], prompt: list[int], whole: list[int]) -> tuple[list[int], int]:
        if whole[: len(prompt)] != prompt:
            reasoning = split_reasoning(messages[-1]["content"])[0]
            kept = not reasoning or reasoning in self._render([(messages, False)])[0]
            what = "" if kept else "deletes the reasoning and "
            raise UserError(
                f"the chat template of {self.where} {what}renders a training row that does not begin with its "
                f"inference prompt, so the student would be asked what it never saw; {self.advice}"
            )
        end = len(whole)
        while end > len(prompt) and whole[end - 1] not in self.stop_token_ids:
            end -= 1
        return (whole[:end] if end > len(prompt) else whole), len(prompt)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a piece of a message, no template around it. Errors: UserError, see `distill.chat.tokens`."""
        if self._control.inside(text):
            return self._control.encode(self._control.replaced(text))
        return self._encode([text])[0]

    def restore(self, completion: str) -> str:
        """The completion with the opening tag that the prompt had prefilled put back."""
        return self.prefill + completion if self.prefill else completion

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion, without the token that ended it; tags and other added tokens stay."""
        ids = list(ids)
        if ids and ids[-1] in self.stop_token_ids:
            ids = ids[:-1]
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def save(self, directory: Path) -> None:
        """Write the tokenizer and its template, readable by transformers 4 too."""
        self.tokenizer.save_pretrained(directory)
        file = directory / "tokenizer_config.json"
        settings = json.loads(file.read_text(encoding="utf-8"))
        if settings.get("tokenizer_class") == "TokenizersBackend":
            settings["tokenizer_class"] = SAVED_CLASS
        if isinstance(extra := settings.get("extra_special_tokens"), list):  # a mapping in transformers 4
            del settings["extra_special_tokens"]
            settings["additional_special_tokens"] = extra
        kept = {key: value for key, value in settings.items() if key not in OURS_ALONE}
        write_whole(file, json.dumps(kept, indent=2, ensure_ascii=False) + "\n")

    # ---- rendering and encoding

    @cached_property
    def _control(self) -> ControlTokens:
        ends = (self.eos_token_id, *self._ends)
        return ControlTokens(self.tokenizer, self.where, RENDERER.literals(self.template), ends)

    @cached_property
    def _variables(self) -> dict[str, Value]:
        """The special tokens by their names, as a template refers to them."""
        return {
            name: value if isinstance(value, str) else [str(token) for token in value]
            for name, value in self.tokenizer.special_tokens_map.items()
        }

    def _render(self, chats: Chats) -> list[str]:
        try:
            return RENDERER.render(self.template, self._variables | self._mode, chats)
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in chats[error.number][0])
            raise UserError(
                f"the chat template of {self.where} does not render a conversation of {roles}: {error}; {self.advice}"
            ) from error

    def _ids(self, chats: Chats) -> list[list[int]]:
        """Token ids of conversations, the control tokens inside their messages as text."""
        texts = self._render(chats)
        control = self._control
        holding = [i for i, (messages, _) in enumerate(chats) if any(control.inside(m["content"]) for m in messages)]
        replaced: Chats = [(control.replaced_in(chats[i][0]), chats[i][1]) for i in holding]
        ids = self._encode(texts)
        for i, text in zip(holding, self._render(replaced) if replaced else (), strict=True):
            ids[i] = control.encode(text)
        return ids

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # The template wrote bos itself; and how long is too long is for the caller to say, not for a warning.
        if not texts:
            return []
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids
