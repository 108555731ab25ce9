"""`distill eval --model DIR`: a real model directory on the local engine, and directories with something wrong."""

import json
import shutil

import pytest
from eval_support import distill, scores, sums

from distill import catalog
from distill.evaluations import read_results

__all__ = ["sums"]


@pytest.fixture
def model(tmp_path):
    """A copy of the tiny student, to be damaged."""
    return shutil.copytree(catalog.folder("student") / "tiny-qwen", tmp_path / "Qwen2.5-Coder-1.5B-Instruct")


def test_a_card_that_asks_for_more_than_the_context_is_answered(sums, model, tmp_path, monkeypatch, capsys):
    """The card asks for 32,768 tokens, the model has a context of 4,096; the option chooses another number."""
    asked = ["eval", "--model", model, "--benchmark", sums, "--out", tmp_path / "out", "--limit", 2, "--samples", 1]
    assert distill(monkeypatch, *asked) == 0
    printed = " ".join(capsys.readouterr().out.split())
    settings = scores(tmp_path / "out", model=model.name).settings
    reduced = settings["sampling.max_new_tokens"]
    assert 3_000 < reduced < 4_096 and settings["sampling.max_new_tokens_asked"] == 32_768
    assert f"max_new_tokens is reduced from 32,768 to {reduced:,}" in printed
    assert distill(monkeypatch, *asked[:5], "--out", tmp_path / "few", "--limit", 2, "--max-new-tokens", 20) == 0
    assert scores(tmp_path / "few", model=model.name).settings["sampling.max_new_tokens"] == 20
    assert "reduced" not in capsys.readouterr().out
    assert all(
        row.completion_tokens <= 20
        for rows in read_results(tmp_path / "few/sums" / model.name).samples.values()
        for row in rows
    )


def test_a_tokenizer_with_more_tokens_than_the_weights_is_one_line(sums, model, tmp_path, monkeypatch, capsys):
    """Byte-level: every byte is a token; a token of the template is given an id past the vocabulary."""
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    for token in tokenizer["added_tokens"]:
        if token["content"] == "<|im_start|>":
            old, token["id"] = token["id"], 9_999
    if "<|im_start|>" in tokenizer["model"]["vocab"]:
        tokenizer["model"]["vocab"]["<|im_start|>"] = 9_999
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert old != 9_999
    assert distill(monkeypatch, "eval", "--model", model, "--benchmark", sums, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert (
        "the tokenizer gives token id 9,999, but the weights have 576 tokens" in error
        and error.count("\n") == 1
        and "Traceback" not in error
    )
    assert not list((tmp_path / "out").rglob("*.json*"))
