"""The tokenizer of a GGUF file as tokenizer.json, by transformers where it is right, repaired where it is not.

Two facts of a byte-level tokenizer (`tokenizer.ggml.model` is gpt2) are lost in the conversion of transformers. A split
of text (`tokenizer.ggml.pre`) that it does not know silently becomes GPT-2's: here a split is in a table, or refused.
A control token outside the byte alphabet (`<｜User｜>`) is left out, and added behind the vocabulary where it begins or
ends a text: here every control and user-defined token gets the id that is its place in the file. The result is read
back and compared with the file.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from distill.errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type
CONVERTED = {  # the values of tokenizer.ggml.pre whose split transformers knows
    "deepseek-r1-qwen",
    "falcon3",
    "gpt-2",
    "gpt-4o",
    "llama-bpe",
    "llama-v3",
    "llama3",
    "megrez",
    "pixtral",
    "qwen2",
    "smaug-bpe",
    "tekken",
}
DIGITS = {"command-r", "refact", "smollm", "starcoder"}  # each digit alone, then GPT-2's split
DIGITS_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def save(path: Path, directory: Path) -> None:
    """Write the tokenizer and the chat template of a GGUF file to a directory.

    Errors: UserError, one line, where transformers cannot convert it, its split is unknown, or a token has another id.
    """
    from gguf import GGUFReader
    from transformers import AutoTokenizer

    reader = GGUFReader(path)
    byte_level = _content(reader, "model", "") == "gpt2"
    split = _content(reader, "pre", "")
    if byte_level and split not in CONVERTED | DIGITS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {str(split)[:40]!r}, a split of text that is not read; supported are "
            f"{', '.join(sorted(CONVERTED | DIGITS))}: use the hub id of the model"
        )
    tokens, types = _content(reader, "tokens", []), _content(reader, "token_type", [])
    whole = {token: number for number, token in enumerate(tokens) if types[number : number + 1] == [CONTROL]}
    plain = {token: number for number, token in enumerate(tokens) if types[number : number + 1] == [USER_DEFINED]}
    with TemporaryDirectory() as alone:  # transformers would read a tokenizer.json beside the file
        (Path(alone) / path.name).symlink_to(path.resolve())
        try:
            AutoTokenizer.from_pretrained(alone, gguf_file=path.name).save_pretrained(directory)
        except Exception as error:  # of any kind: the metadata is a stranger's
            reason = " ".join(str(error).split())[:150] or type(error).__name__
            raise UserError(
                f"{path}: its tokenizer cannot be converted ({reason}); use the hub id of the model"
            ) from error
    if byte_level:
        _repair(directory, tokens, whole, plain, split)
    _check(path, directory, tokens, whole | plain)


def _content(reader: GGUFReader, key: str, default: Any) -> Any:
    field = reader.fields.get(f"tokenizer.ggml.{key}")
    return default if field is None else field.contents()


def _repair(directory: Path, tokens: Sequence[str], whole: dict[str, int], plain: dict[str, int], split: str) -> None:
    """Give the tokens that are matched whole their spelling and id in the file, and text its split.

    whole: control tokens and their ids; plain: user-defined ones."""
    file, settings = directory / "tokenizer.json", directory / "tokenizer_config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    if split in DIGITS:
        content["pre_tokenizer"] = DIGITS_SPLIT
    raw = {number: token for token, number in (whole | plain).items()}
    vocab = {token: number for token, number in content["model"]["vocab"].items() if number < len(tokens)}
    spelled = {number: token for token, number in vocab.items()} | raw
    content["model"]["vocab"] = {token: number for number, token in sorted(spelled.items())}
    content["added_tokens"] = [
        {
            "id": number,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": token in whole,
        }
        for number, token in sorted(raw.items())
    ]
    for name, added in ((content["post_processor"] or {}).get("special_tokens") or {}).items():
        added["ids"] = [content["model"]["vocab"].get(name, number) for number in added["ids"]]
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")
    config = json.loads(settings.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "TokenizersBackend"  # a class of one family builds its own split in place of the file's
    settings.write_text(json.dumps(config, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _check(path: Path, directory: Path, tokens: Sequence[str], whole: dict[str, int]) -> None:
    """Compare the tokenizer that was written with the file. Errors: UserError naming the first token that differs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    written = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["pre_tokenizer"]
    if json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] != written:
        raise UserError(f"{path}: transformers splits text by another rule than the file; use the hub id of the model")
    for token, number in whole.items():
        if tokenizer.encode(token, add_special_tokens=False) != [number]:
            raise UserError(
                f"{path}: token {token!r} has id {number} and would be read as "
                f"{tokenizer.encode(token, add_special_tokens=False)[:8]}; use the hub id of the model"
            )
    if len(tokenizer) != len(tokens):
        raise UserError(
            f"{path}: its tokenizer has {len(tokens):,} tokens, and {len(tokenizer):,} after conversion; use the "
            f"hub id of the model"
        )
