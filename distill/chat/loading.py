"""A model directory's tokenizer, its end tokens, and the built-in training templates.

A model directory is data. Where it names a tokenizer class in code of its own, that code is neither run nor asked
about: tokenizer.json is read instead. Whatever its files hold, a wrong one is reported in one line that names it.

End tokens are collected from tokenizer_config.json, config.json and generation_config.json: several published models
name the token that ends a turn in the last one only (Llama 3 Instruct: `<|eot_id|>`), and an engine that reads one file
never stops.

Some templates write today's date into every prompt (Llama 3.1 to 3.3: `strftime_now`). With the clock's, the prompts of
a run would depend on the day: a resumed generation would mix two, and training, evaluation and a repetition would each
have another. So the day is fixed, at the one that these templates name where they are given none.
"""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import model_families
from distill.chat import ranks
from distill.errors import UserError
from distill.limits import TEMPLATE_BYTES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Ids and their bytes, and nothing else. transformers would read it with the split of another model (with tiktoken
# installed), and encode some texts to other ids than the model was trained on, silently: see ranks.py.
TIKTOKEN = "tiktoken.model"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", TIKTOKEN)
TEMPLATES = {  # built-in training template → the tokens that it needs
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<|turn>", "<turn|>"),  # of Gemma 4
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
END_CONFIGS = ("generation_config.json", "config.json")
TODAY = "2024-07-26"  # in every template that asks for the date
ASKS_DATE = "strftime_now"
LFS_POINTER = b"version https://git-lfs"


def load_tokenizer(model_dir: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model directory. Errors: UserError naming the file that is missing or unreadable."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    vocabulary = next((model_dir / name for name in VOCABULARIES if (model_dir / name).is_file()), None)
    if vocabulary is None:  # transformers would make an empty tokenizer
        raise UserError(f"no usable tokenizer in {model_dir}: {VOCABULARIES[0]} is missing; download it again")
    with vocabulary.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise UserError(f"{vocabulary} is a Git LFS pointer, not the file: run `git lfs pull` in {model_dir}")
    settings = read_settings(model_dir / "tokenizer_config.json")
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        if not isinstance(settings.get(name), str | dict | None):
            raise UserError(
                f"{model_dir / 'tokenizer_config.json'}: {name} is {json.dumps(settings[name])[:60]}; it should be text"
            )
    if vocabulary.name == TIKTOKEN:
        return _converted(vocabulary, settings)
    loader = PreTrainedTokenizerFast if "auto_map" in settings else AutoTokenizer
    return _loaded(loader, model_dir)


def _converted(ranks_file: Path, settings: dict[str, object]) -> "PreTrainedTokenizerBase":
    """The tokenizer of a tiktoken.model. Errors: UserError for a family whose pattern is not known."""
    from transformers import PreTrainedTokenizerFast

    model_dir = ranks_file.parent
    split = model_families.text_split(read_settings(model_dir / "config.json").get("model_type"))
    if not split:
        raise UserError(
            f"no usable tokenizer in {model_dir}: {TIKTOKEN} does not say how text is split before it is encoded, and "
            f"the code beside it, which does, is not run; put the tokenizer.json of a converted copy beside it"
        )
    with tempfile.TemporaryDirectory() as directory:
        ranks.convert(ranks_file, split, settings, Path(directory))
        return _loaded(PreTrainedTokenizerFast, Path(directory), model_dir)


def _loaded(loader: Any, directory: Path, model_dir: Path | None = None) -> "PreTrainedTokenizerBase":
    """The tokenizer that a class of transformers reads from a directory. model_dir: the one to name in errors."""
    try:
        tokenizer: PreTrainedTokenizerBase = loader.from_pretrained(directory, trust_remote_code=False)
    except Exception as error:  # tokenizers raises plain `Exception`, transformers what the wrong value leads to
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(
            f"no usable tokenizer in {model_dir or directory}: {reason}; its tokenizer files are damaged or made by "
            f"another version of the tokenizers library: download them again, or upgrade transformers"
        ) from error
    return tokenizer


def read_settings(file: Path) -> dict[str, object]:
    """The settings in a JSON file of a model directory; none where it is missing. Errors: UserError."""
    if not file.is_file():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({' '.join(str(error).split())}); download it again") from error
    if not isinstance(settings, dict):
        raise UserError(f"{file} holds no settings (a {type(settings).__name__}); download it again")
    return settings


def configured_ends(model_dir: Path) -> list[int]:
    """The ids of `eos_token_id` in generation_config.json and config.json. Errors: UserError for other types."""
    ends: list[int] = []
    for name in END_CONFIGS:
        value = read_settings(model_dir / name).get("eos_token_id")
        for end in value if isinstance(value, list) else [value]:
            if isinstance(end, int) and not isinstance(end, bool):
                ends.append(end)
            elif end is not None:
                raise UserError(f"{model_dir / name}: eos_token_id is {json.dumps(value)[:60]}; it should be a number")
    return list(dict.fromkeys(ends))


def read_template(name: str) -> str:
    """Text of a built-in template, or of a .jinja file. Errors: UserError."""
    path = Path(__file__).parent / "templates" / f"{name}.jinja" if name in TEMPLATES else Path(name)
    if not path.is_file():
        raise UserError(
            f"no chat template {name!r}: it is neither a file nor one of the built-in {', '.join(sorted(TEMPLATES))}"
        )
    if path.stat().st_size > TEMPLATE_BYTES:
        raise UserError(f"{path}: {path.stat().st_size:,} bytes; a chat template has at most {TEMPLATE_BYTES:,}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); is this a chat template?") from None


def reads_date(model_dir: Path, template: str | None) -> bool:
    """Whether a template asks for the date, which is then TODAY. template: as of `Chat.load`. Errors: UserError."""
    if template is not None:
        return ASKS_DATE in read_template(template)
    files = (model_dir / name for name in ("chat_template.jinja", "tokenizer_config.json"))
    return any(ASKS_DATE in file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def own_template(tokenizer: "PreTrainedTokenizerBase", where: str) -> str | None:
    """The template that a checkpoint brings: its only one, or the one named `default`. Errors: UserError."""
    template: object = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise UserError(
                f"{where} has several chat templates ({', '.join(map(str, template))}) and none named default; "
                f"{template_advice(tokenizer, where)}"
            )
        template = template["default"]
    if template is not None and not isinstance(template, str):
        raise UserError(f"{where}: the chat template is a {type(template).__name__}, not text; download it again")
    return template or None


def missing_tokens(tokenizer: "PreTrainedTokenizerBase", template: str) -> list[str]:
    """The control tokens of a built-in template that the tokenizer would encode as plain text; none for a file."""
    vocabulary = tokenizer.get_vocab()
    return [token for token in TEMPLATES.get(template, ()) if token not in vocabulary]


def template_advice(tokenizer: "PreTrainedTokenizerBase", where: str) -> str:
    """What to do instead: the built-in templates that this tokenizer has the tokens for, or a file of one's own."""
    usable = [name for name in TEMPLATES if not missing_tokens(tokenizer, name)]
    file = f"put a chat_template.jinja into {where}"
    if usable:
        return f"for a student set `train.chat_template` to {' or '.join(usable)} (its tokens are here), or {file}"
    lacking = "; ".join(f"{name} needs {', '.join(missing_tokens(tokenizer, name))}" for name in TEMPLATES)
    return (
        f"{file}, or name a .jinja file in `train.chat_template` (no built-in template fits this tokenizer: {lacking})"
    )


def in_vocabulary(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> list[int]:
    """The ids that the tokenizer knows."""
    size = len(tokenizer)
    return [token for token in ids if 0 <= token < size]
