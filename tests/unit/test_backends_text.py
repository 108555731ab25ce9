"""Text of tokens as they come: joined together it is the text of all tokens at once."""

from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from distill.backends.text import Decoder, ReasoningSplitter, StopStrings
from distill.chat import Chat

TINY = Path(__file__).resolve().parents[2] / "teachers" / "tiny-r1"


@cache
def chat() -> Chat:
    return Chat.load(TINY)


def pieces_of(items, sizes):
    """The items in pieces of these sizes, the last piece with the rest."""
    pieces = []
    for size in sizes:
        pieces.append(items[:size])
        items = items[size:]
    return [*pieces, items]


SIZES = st.lists(st.integers(0, 5), max_size=40)


@given(st.text(max_size=60), SIZES)
def test_decoding_in_pieces_is_decoding_at_once(text, sizes):
    ids = chat().text_ids(text)
    pieces = pieces_of(ids, sizes)
    decoder = Decoder(chat())
    parts = [decoder.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert "".join(parts) == chat().decode(ids) == text
    assert not any("\ufffd" in part for part in parts) or "\ufffd" in text


def test_half_a_character_is_held_back_and_given_at_the_end():
    ids = chat().text_ids("é")
    assert len(ids) == 2  # a byte each
    decoder = Decoder(chat())
    assert decoder.feed(ids[:1], False) == "" and decoder.feed(ids[1:], False) == "é"
    assert Decoder(chat()).feed(ids[:1], True) == "\ufffd"


def test_the_end_token_has_no_text():
    decoder = Decoder(chat())
    assert decoder.feed([*chat().text_ids("yes"), chat().stop_token_ids[-1]], True) == "yes"


@given(st.text(max_size=20), st.text(max_size=20), SIZES)
def test_a_completion_is_what_the_text_goes_on_with(prompt, text, sizes):
    pieces = pieces_of(chat().text_ids(text), sizes)
    decoder = Decoder(chat(), chat().text_ids(prompt))
    assert "".join(decoder.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)) == text


def test_a_completion_of_a_sentencepiece_tokenizer_keeps_its_first_space():
    """Its tokens carry the space before a word, and the first of a text is dropped: Llama 2, Mistral."""
    words = {word: number for number, word in enumerate(("<s>", "</s>", "\u2581Once", "\u2581upon", "\u2581a"))}
    model = Tokenizer(models.WordLevel(words, "<s>"))
    model.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, bos_token="<s>", eos_token="</s>")
    spaced = SimpleNamespace(tokenizer=tokenizer, stop_token_ids=(1,))
    spaced.decode = lambda ids: Chat.decode(spaced, ids)
    assert spaced.decode([2, 3, 4]) == "Once upon a" and spaced.decode([4]) == "a"
    assert Decoder(spaced, [0, 2, 3]).feed([4, 1], True) == " a"
    assert Decoder(spaced, [0, 2, 3, 1]).feed([4], True) == " a", "an end token in the prompt has no text"
    assert Decoder(spaced).feed([4], True) == "a", "an answer begins a text"


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), max_size=3), SIZES)
def test_a_text_ends_before_the_first_stop_string(text, strings, sizes):
    stops, pieces = StopStrings(strings), pieces_of(text, sizes)
    kept = "".join(stops.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces))
    # In pieces the string that is complete first wins; of several complete at once, the one that begins first.
    ends = {text.find(string) + len(string): text.find(string) for string in strings if string in text}
    if not ends:
        assert kept == text and not stops.stopped
    else:
        assert stops.stopped and text.startswith(kept)
        assert not any(string in kept for string in strings) and len(kept) <= ends[min(ends)]


@pytest.mark.parametrize(
    ("text", "reasoning", "content"),
    [
        ("<think>\nso\n</think>\n\nfour", "so", "four"),
        ("<think>a <b> </th b</think>c", "a <b> </th b", "c"),
        ("<think></think>four ", "", "four "),
        ("\n<think>so</think>four", "so", "four"),
        ("<think>\nnever closed ", "never closed", ""),
        ("no block at all ", "", "no block at all "),
        ("  <thin", "", "  <thin"),
        ("a <think>b</think>", "", "a <think>b</think>"),
        ("", "", ""),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
    ],
)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_the_think_block_at_the_beginning_is_the_reasoning(text, reasoning, content, size):
    splitter = ReasoningSplitter()
    pieces = [text[i : i + size] for i in range(0, len(text), size)] or [""]
    parts = [splitter.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
    assert ("".join(p.reasoning for p in parts), "".join(p.content for p in parts)) == (reasoning, content)


@given(st.text("<>/think \n", max_size=40), SIZES)
def test_pieces_do_not_change_what_is_reasoning(text, sizes):
    def split(pieces):
        splitter = ReasoningSplitter()
        parts = [splitter.feed(piece, i == len(pieces) - 1) for i, piece in enumerate(pieces)]
        return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)

    for whole in (text, f"<think>{text}</think>{text}"):
        assert split(pieces_of(whole, sizes)) == split([whole])
