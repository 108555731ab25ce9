"""A tokenizer.json from a tiktoken.model, which holds the tokens' bytes and their order of merging, and nothing else.

How text is split before it is encoded is known for the families that publish such a file (`Family.split`), and which
ids stand for control tokens is in tokenizer_config.json. The code that a repository has for all this is not run; where
it is there, it is read as text, and must contain the same pattern.

The conversion is exact. tiktoken joins the two neighbours that make the token of lowest rank, the leftmost of equals.
The tokenizers library joins the neighbours that come first in a list of pairs. A token can be split into several pairs
of others, which stand in that list one after the other, but only one of them ever occurs as neighbours: inside the
bytes of a token the joins before the last are the same wherever these bytes are, since none crosses their border.

Kimi's own code also cuts texts of more than 400,000 characters, and runs of more than 25,000 characters without a space
or of spaces alone; that is not done here.
"""

import base64
import binascii
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from distill.errors import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BESIDE = ("chat_template.jinja", "special_tokens_map.json")  # what a tokenizer.json is read together with
SETTINGS = "tokenizer_config.json"
CLASS_SETTINGS = ("auto_map", "tokenizer_class", "backend")  # name the code that is not run
RESERVED = 256  # control tokens after the last rank


def convert(ranks_file: Path, split: Sequence[str], settings: dict[str, object], to: Path) -> None:
    """Write the tokenizer of a model directory with a tiktoken.model to the directory `to`, as a tokenizer.json with
    the files that go with it. Errors: UserError naming the file that is damaged or says something else."""
    source = ranks_file.parent
    _check_code(source, split, settings)
    tokenizer = _tokenizer(ranks_file, split, _control_tokens(source / SETTINGS, settings))
    tokenizer.save(str(to / "tokenizer.json"))
    kept = {key: value for key, value in settings.items() if key not in CLASS_SETTINGS}
    (to / SETTINGS).write_text(json.dumps(kept), encoding="utf-8")
    for name in BESIDE:
        if (source / name).is_file():
            shutil.copy(source / name, to / name)


def read_ranks(file: Path) -> dict[bytes, int]:
    """Token → rank, of lines of base64 and a number. Errors: UserError naming the line; for ranks that are not those
    from 0 on, and for bytes without a token."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise UserError(f"{file}: line {number} is not a token in base64 and its rank; download it again") from None
    if sorted(ranks.values()) != list(range(len(ranks))) or not all(bytes([byte]) in ranks for byte in range(256)):
        raise UserError(f"{file}: its ranks have gaps, or a byte has no token; download it again")
    return ranks


def _check_code(source: Path, split: Sequence[str], settings: dict[str, object]) -> None:
    """Errors: UserError where the tokenizer's own code is there and has another pattern."""
    auto_map = settings.get("auto_map")
    named = auto_map.get("AutoTokenizer") if isinstance(auto_map, dict) else None
    for reference in named if isinstance(named, list) else [named]:
        code = source / f"{str(reference).partition('.')[0]}.py"
        if reference is None or code.parent != source or not code.is_file():
            continue
        text = code.read_text(encoding="utf-8", errors="replace")
        if not all(alternative in text for alternative in split):
            raise UserError(
                f"no usable tokenizer in {source}: {code.name} splits text by another pattern than the one known for "
                "this family; put the tokenizer.json of a converted copy beside it"
            )


def _control_tokens(file: Path, settings: dict[str, object]) -> dict[int, tuple[str, bool]]:
    """Id → text of a control token, and whether it is a special one. Errors: UserError."""
    listed = settings.get("added_tokens_decoder")
    tokens: dict[int, tuple[str, bool]] = {}
    for number, token in listed.items() if isinstance(listed, dict) else ():
        content = token.get("content") if isinstance(token, dict) else None
        if not number.isdecimal() or not isinstance(content, str) or not content:
            raise UserError(f"{file}: added_tokens_decoder has an entry that is no token; download it again")
        tokens[int(number)] = content, bool(token.get("special", False))
    return tokens


def _tokenizer(ranks_file: Path, split: Sequence[str], control: dict[int, tuple[str, bool]]) -> "Tokenizer":
    from tokenizers import AddedToken
    from transformers.convert_slow_tokenizer import TikTokenConverter

    ranks = read_ranks(ranks_file)

    class Converter(TikTokenConverter):  # type: ignore[misc]  # its own reader needs the tiktoken library
        @staticmethod
        def load_tiktoken_bpe(tiktoken_url: str) -> dict[bytes, int]:
            return ranks

    tokenizer: Tokenizer = Converter(str(ranks_file), pattern="|".join(split)).converted()
    ids = range(len(ranks), len(ranks) + RESERVED)
    if wrong := sorted(control.keys() - set(ids)):
        raise UserError(
            f"{ranks_file.parent / SETTINGS}: token {wrong[0]} is not one of the {RESERVED} after the {len(ranks):,} "
            f"of {ranks_file.name}; download both again"
        )
    for number in ids:
        text, special = control.get(number, (f"<|reserved_token_{number}|>", True))
        token = AddedToken(text, normalized=False, special=special)
        _ = tokenizer.add_special_tokens([token]) if special else tokenizer.add_tokens([token])
        if tokenizer.token_to_id(text) != number:
            raise UserError(
                f"{ranks_file.parent / SETTINGS}: token {number} ({text}) is there twice; download it again"
            )
    return tokenizer
