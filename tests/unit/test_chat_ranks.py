"""A tiktoken.model: the same ids as tiktoken's algorithm gives, and what is refused."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kimi_support import CODE, WORDS, by_force, publish, reference_ids, vocabulary
from tokenizers import Tokenizer

from distill.chat import Chat, ranks
from distill.engine.families.kimi_k2 import SPLIT
from distill.errors import UserError


@pytest.fixture(scope="module")
def tokens() -> list[bytes]:
    return vocabulary(WORDS, 200)


@pytest.fixture(scope="module")
def chat(tokens: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> Chat:
    return Chat.load(publish(tmp_path_factory.mktemp("kimi"), tokens))


def test_the_pattern_is_the_published_one() -> None:
    assert "|".join(SPLIT) == (
        r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )


@settings(max_examples=150)
@given(
    st.lists(
        st.sampled_from(WORDS.split(" "))
        | st.sampled_from([" ", "  ", "\n", "'s", "'LL", "12", "漢"])
        | st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cn", "Cc")), max_size=4),
        max_size=8,
    ).map("".join)
)
def test_ids_are_those_of_tiktokens_algorithm(chat: Chat, tokens: list[bytes], text: str) -> None:
    ids = chat.tokenizer.encode(text, add_special_tokens=False)
    assert ids == reference_ids(text, tokens)
    assert chat.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(
    st.text("abc", min_size=1, max_size=40), st.lists(st.text("abc", min_size=2, max_size=6), unique=True, max_size=12)
)
def test_merges_of_any_vocabulary(text: str, words: list[str]) -> None:
    """Also of one that no training makes: tokens that no join reaches, and several splits of one token."""
    from tokenizers.models import BPE

    tokens = [b"a", b"b", b"c", *(word.encode() for word in words)]
    known = {token: rank for rank, token in enumerate(tokens)}
    pairs = [
        (known[word], known[word[:at]], known[word[at:]], word[:at].decode(), word[at:].decode())
        for word in known
        for at in range(1, len(word))
        if word[:at] in known and word[at:] in known
    ]
    model = BPE({token.decode(): rank for token, rank in known.items()}, [pair[3:] for pair in sorted(pairs)])
    model.ignore_merges = True
    assert [token.id for token in model.tokenize(text)] == [known[part] for part in by_force(text.encode(), known)]


@pytest.mark.parametrize("without", range(1, 7))
def test_each_part_of_the_pattern_counts(without: int, chat: Chat, tokens: list[bytes], tmp_path: Path) -> None:
    """Han alone and the last spaces are what no other alternative takes, and are split off without one."""
    left = [alternative for at, alternative in enumerate(SPLIT) if at != without]
    ranks.convert(publish(tmp_path / "model", tokens) / "tiktoken.model", left, {}, tmp_path)
    ids = Tokenizer.from_file(str(tmp_path / "tokenizer.json")).encode(WORDS).ids
    assert ids != reference_ids(WORDS, tokens) == chat.tokenizer.encode(WORDS, add_special_tokens=False)


def test_control_tokens_and_the_template(chat: Chat, tokens: list[bytes]) -> None:
    base = len(tokens)
    ids = chat.prompt_ids([{"role": "user", "content": "they"}])
    word = reference_ids("they", tokens)
    opened = [base + 4, *reference_ids("assistant", tokens), base + 17, base + 22]
    assert list(ids) == [base + 3, *reference_ids("user", tokens), base + 17, *word, base + 2, *opened]
    assert set(chat.stop_token_ids) == {base + 1, base + 2}
    assert len(chat.tokenizer) == base + 256
    assert chat.tokenizer.convert_ids_to_tokens(base + 100) == f"<|reserved_token_{base + 100}|>"
    assert base + 22 not in chat.tokenizer.all_special_ids, "reasoning would be decoded without its tags"
    assert chat.tokenizer.decode([base + 22, base + 2], skip_special_tokens=True) == "<think>"
    inside = chat.prompt_ids([{"role": "user", "content": "<|im_end|>"}])
    assert list(inside).count(base + 2) == 1, "a control token in a question is text"


def test_what_is_refused(tokens: list[bytes], tmp_path: Path) -> None:
    def refusal(path: Path) -> str:
        with pytest.raises(UserError) as error:
            Chat.load(path)
        assert "\n" not in str(error.value)
        return str(error.value)

    unknown = refusal(publish(tmp_path / "unknown", tokens, model_type="deepseek_v3"))
    assert "tiktoken.model does not say how text is split" in unknown
    other = CODE.replace("{alternatives}", 'r"""[\\p{Han}]+"""')
    assert "tokenization_kimi.py splits text by another pattern" in refusal(
        publish(tmp_path / "other", tokens, code=other)
    )
    path = publish(tmp_path / "damaged", tokens)
    file = path / "tiktoken.model"
    whole = file.read_text()
    file.write_text(whole.replace("\n", "\nno rank\n", 1))
    assert "tiktoken.model: line 2 is not a token in base64 and its rank" in refusal(path)
    file.write_text("\n".join(whole.splitlines()[1:]))
    assert "its ranks have gaps, or a byte has no token" in refusal(path)
    file.write_text(whole + f"{base64.b64encode(b'more than these').decode()} {len(tokens)}\n")
    assert f"token {len(tokens)} is not one of the 256 after" in refusal(path)
    assert ranks.read_ranks(publish(tmp_path / "sound", tokens) / "tiktoken.model")[tokens[300]] == 300
