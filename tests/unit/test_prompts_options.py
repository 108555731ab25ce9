"""Questions with options: which option the answer column means."""

from pathlib import Path
from typing import Any

import pytest
from prompt_support import file_refused, jsonl, read

from distill.prompts import PromptCounts, load_prompts
from distill.recipe.sources import FilePrompts

OPTIONS = {"options": "options", "task": "choice"}


@pytest.mark.parametrize(
    ("options", "answer", "letter"),
    [
        (["a", "b", "c"], "C", "C"),
        (["a", "b", "c"], "(C)", "C"),
        (["a", "b", "c"], 2, "C"),
        (["a", "b", "c"], "2", "C"),
        (["a", "b", "c"], "c", "C"),
        (["a ", "b", " c"], "c ", "C"),
        (["1", "2", "3"], 2, "C"),
        (["1.5", "2.5", ""], "2.5", "B"),
        ([1.5, 2.5], "2.5", "B"),
        (["a", "a", "b"], "B", "B"),
        (["B", "B"], "B", "B"),
        (["x", "y"], "b", "B"),
        (["x", "y"], "B.", "B"),
        (["b", "a"], "a", "B"),
        ({"B": "y", "A": "x"}, "B", "B"),
        ({"A": "x", "B": "y", "C": None}, "y", "B"),
        ('["a", "b"]', "b", "B"),
    ],
)
def test_the_right_option(options: object, answer: object, letter: str, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "?", "options": options, "answer": answer})
    if options == ["B", "B"]:
        file_refused(path, "column answer is 'B', which may mean several options", **OPTIONS)
        return
    assert [prompt.answer for prompt in read(path, **OPTIONS)] == [letter]


@pytest.mark.parametrize(
    ("form", "options", "answer", "letter"),
    [
        ("letter", ["B", "A", "C", "D"], "A", "A"),
        ("text", ["B", "A", "C", "D"], "A", "B"),
        ("index", ["3", "2", "1", "0"], "3", "D"),
        ("text", ["3", "2", "1", "0"], "3", "A"),
        ("text", [3, 2, 1, 0], 3, "A"),
        ("index", ["a", "b"], 1, "B"),
        ("letter", ["a", "b"], "1", "is '1', which is no option: expected a letter from A to B"),
        ("index", ["a", "b"], "b", "is 'b', which is no option: expected an index from 0"),
        ("text", ["a", "b"], "B", "is 'B', which is no option: expected an option's text"),
        ("text", ["a", "a"], "a", "is 'a', the text of several options"),
        (None, ["B", "A", "C", "D"], "A", "say what the column has with `answer_is: letter`"),
    ],
)
def test_the_form_of_the_answer_decides(
    form: Any, options: list[object], answer: object, letter: str, tmp_path: Path
) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "?", "options": options, "answer": answer})
    if len(letter) == 1:
        assert [prompt.answer for prompt in read(path, answer_is=form, **OPTIONS)] == [letter]
    else:
        file_refused(path, letter, answer_is=form, **OPTIONS)


def test_a_wrong_choice_that_differs_in_white_space_only_is_refused(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "?", "right": "r ", "wrong": "r"})
    file_refused(path, "the right answer is among the wrong choices", answer="right", choices=("wrong",), task="choice")


@pytest.mark.parametrize(
    ("options", "answer", "message"),
    [
        (["0", "1", "2"], "1", None),
        (["1", "2", "3"], "1", "column answer is '1', which may mean several options"),
        (["a", "b"], "C", "column answer is 'C', which is no option: expected a letter from A to B"),
        (["a", "b"], 2, "column answer is 2, and the 2 options have the indices 0 to 1"),
        (["a", "b"], -1, "the 2 options have the indices 0 to 1"),
        (["a", "b"], True, "column answer is a bool"),
        (["a", "b"], None, "column answer is empty"),
        (["a", "b"], 1.0, "column answer is a float"),
        (["a", "a"], "a", "which may mean several options"),
        (["a"], "A", "the number of options is 1; a question has 2 to 10"),
        ([str(n) for n in range(11)], "A", "the number of options is 11; a question has 2 to 10"),
        (["a", None], "A", "option B is empty, not text"),
        (["a", ["b"]], "A", "option B is a list, not text"),
        ("a, b", "A", "column options is a str, not a list of options"),
        (None, "A", "column options is empty, not a list of options"),
    ],
)
def test_doubtful_options_are_refused(options: object, answer: object, message: str | None, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "?", "options": options, "answer": answer})
    if message is None:
        assert read(path, **OPTIONS)[0].answer == "B"
    else:
        file_refused(path, message, **OPTIONS)


@pytest.mark.parametrize(
    ("labels", "answer", "message"),
    [
        (["1", "2"], "3", "column answer is '3', which is none of the labels 1, 2"),
        (["1"], "1", "has 2 options, and its labels are not as many different ones"),
        (["1", "1"], "1", "its labels are not as many different ones"),
        (None, "1", None),
    ],
)
def test_labels(labels: object, answer: str, message: str | None, tmp_path: Path) -> None:
    row = {"question": "?", "options": ["a", "b"], "labels": labels, "answer": answer}
    path = jsonl(tmp_path / "a.jsonl", row)
    if message is None:
        assert read(path, labels="labels", **OPTIONS)[0].answer == "B"  # without labels, an index from 0
    else:
        file_refused(path, message, labels="labels", **OPTIONS)


@pytest.mark.parametrize("options", [{"B": "x", "C": "y"}, {"text": ["x", "y"], "label": ["A", "B"]}])
def test_an_object_without_all_letters_is_refused(options: object, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "?", "options": options, "answer": "B"})
    file_refused(path, "column options is a dict, not a list of options", **OPTIONS)


def test_a_note_names_columns_that_may_be_part_of_the_question(tmp_path: Path) -> None:
    rows = [
        {"question": "?", "options": ["x", "y"], "answer": "B", "system_prompt": "S", "input": each}
        for each in ("a", "")
    ]
    path, name = jsonl(tmp_path / "a.jsonl", *rows), f"{tmp_path.name}/a.jsonl"

    def notes(**fields: Any) -> list[str]:
        counts = PromptCounts()
        list(load_prompts([FilePrompts(kind="file", path=str(path), task="choice", **fields)], counts))
        return counts.notes()[:-1]  # the question is the same twice

    columns = "system_prompt (2 of 2 problems), input (1 of 2 problems), options (2 of 2 problems)"
    assert notes() == [
        f"{name}: columns that may be part of the question are not asked: {columns}; "
        f"set `system: system_prompt` and `options: options` and `template: '{{{{question}}}} {{{{input}}}}'`"
    ]
    assert notes(system=None)[0].split("asked: ")[1].startswith("input (1 of 2 problems), options")
    assert not notes(system="system_prompt", options="options", template="{{question}} {{input}} {{options}}")
