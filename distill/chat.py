"""Tokenizers and chat templates: nobody else loads one.

Two templates matter to a reasoning model and they are not the same. The inference template of R1 keeps only what
follows the last `</think>` of earlier turns; used on training rows it deletes the very reasoning that should be
learnt. So training goes through `training_ids`, which renders the conversation whole and demands that it begins,
token for token, with the prompt that inference will use. A template that cannot do so is refused here, not discovered
in a score.

Where a template opens the thinking itself (`…<｜Assistant｜><think>\\n`) a completion has only the closing tag;
`prefill` says what was opened, and `Chat.restore` puts it back, so that stored text always has both tags.

Some checkpoints have two modes in one template and choose by a variable: `thinking` in DeepSeek-V3.1, `enable_thinking`
in Qwen3. Both names are passed, a template reads its own. Without thinking the prompt ends with the block closed
(`…<｜Assistant｜></think>`): nothing is open, nothing is put back, and the completion has no reasoning.
"""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill.errors import UserError
from distill.prompts.prompt import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tiktoken.model")
THINK, END_THINK = "<think>", "</think>"
TEMPLATES = {"chatml": "chatml.jinja", "llama3": "llama3.jinja"}  # built-in training templates


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Split a completion into (reasoning, response).

    The reasoning is what stands between the first `<think>` and the last `</think>`, stripped of surrounding white
    space; an empty block gives "". It is None when no block was closed, and then the response is what precedes an
    open `<think>` (usually nothing) or, without any tag, the whole text. A lone `</think>` closes a block that the
    prompt had opened.
    """
    head, closed, response = text.rpartition(END_THINK)
    if not closed:
        return None, text.partition(THINK)[0].strip()
    before, opened, inside = head.partition(THINK)
    reasoning = inside if opened and not before.strip() else head
    return reasoning.strip(), response.strip()


class Chat:
    """One tokenizer with one chat template, in one of its modes. thinking: None is the template's default."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", where: str, thinking: bool | None = None) -> None:
        if not tokenizer.chat_template:
            raise UserError(
                f"{where} has no chat template; set `chat_template` in the student's card or `train.chat_template` "
                f"to one of {', '.join(sorted(TEMPLATES))} or to a .jinja file"
            )
        if tokenizer.eos_token_id is None:
            raise UserError(f"{where}/tokenizer_config.json names no eos_token: generation could never stop")
        self.tokenizer = tokenizer
        self.where = where
        self._mode: dict[str, bool] = {}
        if thinking is not None:
            self._choose(thinking)

    @classmethod
    def load(cls, model_dir: Path, template: str | None = None, thinking: bool | None = None) -> "Chat":
        """Load a model directory's tokenizer; `template` is a built-in name, a .jinja file, or None for its own.

        thinking: which of the template's two modes, None for its default. UserError where it has only one.
        """
        from transformers import AutoTokenizer, PreTrainedTokenizerFast

        # A model directory is data. Where it names a tokenizer class in code of its own, that is neither run nor asked
        # about: tokenizer.json is read instead.
        config = model_dir / "tokenizer_config.json"
        try:
            settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
            if not isinstance(settings, dict):
                raise ValueError("tokenizer_config.json holds no settings; download it again")
            if not any((model_dir / name).is_file() for name in VOCABULARIES):  # of none, an empty tokenizer is made
                raise ValueError(f"{VOCABULARIES[0]} is missing; download it again")
            loader = PreTrainedTokenizerFast if "auto_map" in settings else AutoTokenizer
            tokenizer = loader.from_pretrained(model_dir, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise UserError(f"no usable tokenizer in {model_dir}: {str(error).splitlines()[0]}") from error
        if template is not None:
            tokenizer.chat_template = read_template(template)
        return cls(tokenizer, str(model_dir), thinking)

    def _choose(self, thinking: bool) -> None:
        probe: list[Message] = [{"role": "user", "content": "q"}]
        prompts = {}
        for mode in (not thinking, thinking):  # the one that stays comes last
            self._mode = {"thinking": mode, "enable_thinking": mode}
            prompts[mode] = self.prompt_text(probe)
        if prompts[True] == prompts[False]:
            raise UserError(
                f"the chat template of {self.where} has one mode only, with or without thinking: "
                f"remove `thinking` from the teacher's card"
            )

    @property
    def eos_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end an assistant turn: eos, and the token the template closes a turn with."""
        probe: list[Message] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
        ids = self._render(probe, add_generation_prompt=False)
        special = set(self.tokenizer.all_special_ids)
        closing = [token for token in ids[-2:] if token in special]
        return tuple(dict.fromkeys([self.eos_token_id, *closing]))

    @cached_property
    def prefill(self) -> str:
        """What the generation prompt has already opened of the answer: `<think>\\n`, `<think>` or nothing."""
        text = self.prompt_text([{"role": "user", "content": "q"}])
        opening = text.rfind(THINK)
        return text[opening:] if opening >= 0 and not text[opening + len(THINK) :].strip() else ""

    def prompt_text(self, messages: Sequence[Message]) -> str:
        return str(self._render_text(messages, add_generation_prompt=True))

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the conversation, ready for the assistant's answer."""
        return self._render(messages, add_generation_prompt=True)

    def training_ids(self, messages: Sequence[Message]) -> tuple[list[int], int]:
        """Token ids of the whole conversation, end of turn included, and how many of them are the prompt.

        The first part is exactly `prompt_ids(messages[:-1])`, and the rest ends at the token that closes the turn:
        white space that a template puts between turns is never sampled, so it is not trained.

        Raises UserError when the template renders training text that does not begin with the inference prompt.
        """
        return self.training_rows([messages])[0]

    def training_rows(self, conversations: Sequence[Sequence[Message]]) -> list[tuple[list[int], int]]:
        """`training_ids` of many conversations at once, which the tokenizer spreads over the cores."""
        assert all(messages[-1]["role"] == "assistant" for messages in conversations), "the last message is learnt"
        prompts = self._encode([self._render_text(messages[:-1], True) for messages in conversations])
        wholes = self._encode([self._render_text(messages, False) for messages in conversations])
        return [self._row(*row) for row in zip(conversations, prompts, wholes, strict=True)]

    def _row(self, messages: Sequence[Message], prompt: list[int], whole: list[int]) -> tuple[list[int], int]:
        if whole[: len(prompt)] != prompt:
            reasoning = split_reasoning(messages[-1]["content"])[0]
            kept = not reasoning or reasoning in self._render_text(messages, add_generation_prompt=False)
            what = "" if kept else "deletes the reasoning and "
            raise UserError(
                f"the chat template of {self.where} {what}renders a training row that does not begin with its "
                f"inference prompt, so the student would be asked what it never saw; set `train.chat_template` to one "
                f"of {', '.join(sorted(TEMPLATES))} or mend the template"
            )
        end = len(whole)
        while end > len(prompt) and whole[end - 1] not in self.stop_token_ids:
            end -= 1
        return (whole[:end] if end > len(prompt) else whole), len(prompt)

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a piece of text, no template around it."""
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
        self.tokenizer.save_pretrained(directory)

    def _render_text(self, messages: Sequence[Message], add_generation_prompt: bool) -> Any:
        return self.tokenizer.apply_chat_template(
            [dict(m) for m in messages], tokenize=False, add_generation_prompt=add_generation_prompt, **self._mode
        )

    def _render(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        return self._encode([self._render_text(messages, add_generation_prompt)])[0]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        # The template wrote bos itself; and how long is too long is for the caller to say, not for a warning.
        ids: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return ids


def read_template(name: str) -> str:
    """Text of a built-in template, or of a .jinja file."""
    builtin = TEMPLATES.get(name)
    path = Path(__file__).parent / "templates" / builtin if builtin else Path(name)
    if not path.is_file():
        raise UserError(
            f"no chat template {name!r}: it is neither a file nor one of the built-in {', '.join(sorted(TEMPLATES))}"
        )
    return path.read_text(encoding="utf-8")
