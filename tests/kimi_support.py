"""The tokenizer files of Kimi K2's repositories, with a tiny vocabulary, and tiktoken's algorithm written out by force
over Python's `regex`."""

from __future__ import annotations

import base64
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import regex

from distill.engine.families.kimi_k2 import SPLIT

TEMPLATE = (
    "{%- for message in messages -%}<|im_user|>user<|im_middle|>{{ message['content'] }}<|im_end|>{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_assistant|>assistant<|im_middle|><think>{%- endif -%}"
)
CONTROL = {
    0: ("[BOS]", True),
    1: ("[EOS]", True),
    2: ("<|im_end|>", True),
    3: ("<|im_user|>", True),
    4: ("<|im_assistant|>", True),
    17: ("<|im_middle|>", True),
    22: ("<think>", False),
    23: ("</think>", False),
    255: ("[PAD]", True),
}
WORDS = "the they them then 'tis it's IT'S Hello HELLO helloWorld 漢字 漢字かな 12345 a1b2  x\n\n\ty ...!? émigré"
WORDS += " a\n\n  b İstanbul \u017f'\u017f"  # a long s is an s where case is ignored
CODE = """raise SystemExit("executed")
class TikTokenTokenizer:
    pat_str = "|".join([{alternatives}])
"""


def vocabulary(text: str, count: int) -> list[bytes]:
    """Tokens by rank: the 256 bytes in another order than their own, then `count` neighbours of two and three bytes of
    a text, the most frequent first. Some go beyond where the text is split: a wrong split would join them."""
    data = text.encode()
    neighbours = Counter(data[at : at + size] for size in (2, 3) for at in range(len(data) - size + 1))
    by_count = sorted(neighbours, key=lambda token: (-neighbours[token], len(token), token))
    return [bytes([255 - byte]) for byte in range(256)] + by_count[:count]


def by_force(text: bytes, known: dict[bytes, int]) -> list[bytes]:
    """tiktoken's loop: a whole piece that is a token, else join the pair of lowest rank, the leftmost of equals."""
    if text in known:
        return [text]
    parts = [bytes([byte]) for byte in text]
    while True:
        pairs = [(known[a + b], at) for at, (a, b) in enumerate(pairwise(parts)) if a + b in known]
        if not pairs:
            return parts
        _, at = min(pairs)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def reference_ids(text: str, tokens: list[bytes]) -> list[int]:
    known = {token: rank for rank, token in enumerate(tokens)}
    pieces = [match[0] for match in regex.finditer("|".join(SPLIT), text, regex.V1)]
    assert "".join(pieces) == text
    return [known[part] for piece in pieces for part in by_force(piece.encode(), known)]


def publish(path: Path, tokens: list[bytes], model_type: str = "kimi_k2", code: str = "") -> Path:
    """What the repositories of Kimi K2 have beside the weights."""
    path.mkdir(parents=True, exist_ok=True)
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(tokens)]
    (path / "tiktoken.model").write_text("\n".join(lines) + "\n")
    listed = {
        str(len(tokens) + at): {"content": text, "lstrip": False, "normalized": False, "rstrip": False}
        | {"single_word": False, "special": special}
        for at, (text, special) in CONTROL.items()
    }
    config: dict[str, Any] = {
        "added_tokens_decoder": listed,
        "additional_special_tokens": [text for text, special in CONTROL.values() if special],
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "clean_up_tokenization_spaces": False,
        "eos_token": "[EOS]",
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "[PAD]",
        "tokenizer_class": "TikTokenTokenizer",
        "unk_token": None,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    (path / "config.json").write_text(json.dumps({"model_type": model_type, "eos_token_id": len(tokens) + 1}))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": len(tokens) + 2}))
    alternatives = ", ".join(f'r"""{alternative}"""' for alternative in SPLIT)
    (path / "tokenization_kimi.py").write_text(code or CODE.replace("{alternatives}", alternatives))
    return path
