"""Shipped benchmark cards on rows of the published form, and what a card of one's own may say."""

import json
from pathlib import Path
from typing import Any

import pytest
from eval_support import distill, scores, server, url
from prompt_support import file_refused, jsonl, read
from pydantic import ValidationError

from distill import catalog
from distill.errors import UserError
from distill.eval.benchmark import Benchmark, local_sources, source_names
from distill.filters.resources import RunResources
from distill.prompts import Prompt, load_prompts
from distill.recipe import BenchmarkCard, Eval
from distill.recipe.sources import FilePrompts

ROWS: dict[str, dict[str, Any]] = {  # card → a made-up row with the columns of the published data set
    "aime-2026": {"id": "1", "problem": "1+1?", "answer": "2"},
    "hmmt-2025": {"problem_idx": 1, "problem": "1+1?", "answer": "2", "problem_type": ["Algebra"]},
    "hmmt-2026": {"problem_idx": 1, "answer": "2", "problem_type": ["Algebra"], "problem": "1+1?"},
    "olymmath": {"problem": "1+1?", "answer": "2", "subject": "Algebra", "unique_id": "OlymMATH-EASY-0-EN"},
    "minerva": {"question": "1+1?", "answer": "2"},
    "mmlu": {"question": "1+1?", "subject": "algebra", "choices": ["1", "2", "3", "4"], "answer": 1},
    "mmlu-redux": {
        "id": "x",
        "question": "1+1?",
        "choices": ["one", "two", "three", "four"],
        "correct_answer": "two",
        "source": "",
        "config": "algebra",
        "task_type": "",
    },
    "mmlu-pro": {
        "question_id": 70,
        "question": "1+1?",
        "options": [str(n) for n in (0, 1, 3, 4, 5, 6, 7, 8, 9, 2)],
        "answer": "J",
        "answer_index": 9,
        "cot_content": "",
        "category": "math",
        "src": "",
    },
    "arc-challenge": {
        "id": "MCAS",
        "question": "1+1?",
        "choices": {"text": ["1", "2", "3"], "label": ["1", "2", "3"]},
        "answerKey": "2",
    },
    "simpleqa": {"metadata": "{'topic': 'Math'}", "problem": "1+1?", "answer": "2"},
    "chinese-simpleqa": {
        "id": "x",
        "primary_category": "",
        "secondary_category": "",
        "question": "1+1=?",
        "answer": "2",
        "urls": [],
    },
    "c-eval": {"id": 0, "question": "1+1=____", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"},
    "ifeval": {
        "key": 1000,
        "prompt": "Write two words without commas.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{"num_words": None}, {"num_words": 3, "relation": "less than"}],
    },
}
GOLDS = {
    "mmlu": "B",
    "mmlu-redux": "B",
    "mmlu-pro": "J",
    "arc-challenge": "B",
    "c-eval": "B",
    "ifeval": '[{"id": "punctuation:no_comma"}, {"id": "length_constraints:number_words", "num_words": 3, '
    '"relation": "less than"}]',
}


def prompts_of(card: BenchmarkCard, path: Path, *rows: dict[str, Any]) -> list[Prompt]:
    return list(load_prompts(local_sources(card, [jsonl(path, *rows)])))


@pytest.mark.parametrize("name", ROWS)
def test_a_shipped_card_reads_the_published_form(name: str, tmp_path: Path) -> None:
    card = catalog.load_benchmark(name)
    (prompt,) = prompts_of(card, tmp_path / "rows.jsonl", ROWS[name])
    assert prompt.task == card.task
    assert prompt.answer == GOLDS.get(name, "2")
    row = ROWS[name]
    assert str(row.get("problem") or row.get("question") or row["prompt"]) in prompt.messages[-1]["content"]


def test_the_options_of_mmlu_pro_are_listed_up_to_j(tmp_path: Path) -> None:
    card = catalog.load_benchmark("mmlu-pro")
    (prompt,) = prompts_of(card, tmp_path / "rows.jsonl", ROWS["mmlu-pro"])
    assert prompt.messages[-1]["content"] == (
        "The following is a multiple choice question about math.\n\n1+1?\n\n"
        "A) 0\nB) 1\nC) 3\nD) 4\nE) 5\nF) 6\nG) 7\nH) 8\nI) 9\nJ) 2"
    )


def test_every_shipped_benchmark_says_where_its_facts_come_from() -> None:
    for name in ROWS:
        text = catalog.find("benchmark", name).read_text(encoding="utf-8")
        assert text.startswith("# "), name
        assert "revision:" in text or "Not pinned" in text, name


# ---- options


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


def test_a_template_is_filled_once_and_leaves_latex_alone(tmp_path: Path) -> None:
    row = {"question": "What is {{secret}}?", "unit": {"name": "cm"}, "secret": "x", "answer": "2"}
    path = jsonl(tmp_path / "a.jsonl", row)
    (prompt,) = read(path, template="{{question}} In {{ unit.name }}, as \\boxed{A} {}.")
    assert prompt.messages[-1]["content"] == "What is {{secret}}? In cm, as \\boxed{A} {}."
    file_refused(path, "no column missing", template="{{question}} {{missing}}")
    file_refused(path, "column unit is a dict; the template needs its text", template="{{question}} {{unit}}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"template": "What?"}, "template has no {{question}}"),
        ({"template": "{{question}} {{options}}"}, "template needs {{options}} where `options` is set"),
        ({"template": "{{question}}", **OPTIONS}, "template needs {{options}} where `options` is set"),
        ({"options": "options"}, "options needs task: choice"),
        ({"labels": "labels"}, "labels needs `options`"),
        ({"task": "instructions"}, "task instructions needs extract: instructions"),
        ({"extract": "instructions"}, "extract: instructions is for task instructions"),
    ],
)
def test_fields_that_do_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message.replace("{", r"\{").replace("}", r"\}")):
        BenchmarkCard.model_validate({"name": "a", "prompts": {"kind": "file", "path": "a.jsonl", **fields}})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kwargs": None}, "has 2 instruction ids, and column kwargs is not a list of as many objects"),
        ({"kwargs": [{}]}, "has 2 instruction ids, and column kwargs is not a list of as many objects"),
        ({"kwargs": [{}, 5]}, "has instruction length_constraints:number_words, whose arguments in column kwargs"),
        ({"instruction_id_list": "punctuation:no_comma"}, "is not a list of instruction ids"),
    ],
)
def test_damaged_instructions_are_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    card = catalog.load_benchmark("ifeval")
    with pytest.raises(UserError, match=message):
        prompts_of(card, tmp_path / "a.jsonl", ROWS["ifeval"] | changes)


# ---- several sources


def several(tmp_path: Path) -> BenchmarkCard:
    paths = [jsonl(tmp_path / f"{n}.jsonl", {"question": f"{n} + 1?", "answer": str(n + 1)}) for n in range(2)]
    sources = [{"kind": "file", "path": str(path)} for path in paths]
    (tmp_path / "card.yaml").write_text(json.dumps({"name": "sums", "prompts": sources, "problems": 2}))
    return catalog.load_benchmark(str(tmp_path / "card.yaml"))


def test_sources_are_read_in_order(tmp_path: Path) -> None:
    card = several(tmp_path)
    benchmark = Benchmark.of(card, Eval(benchmarks=("sums",)))
    assert [prompt.answer for prompt in benchmark.prompts] == ["1", "2"]
    assert benchmark.settings()["prompts.1.task"] == "math"
    assert catalog.check("benchmark", str(tmp_path / "card.yaml")) == []


def test_subsets_are_sources() -> None:
    card = catalog.load_benchmark("olymmath")
    assert [source.subset for source in card.sources] == ["en-easy", "en-hard", "zh-easy", "zh-hard"]  # type: ignore[union-attr]  # of kind hub
    assert len(catalog.load_benchmark("c-eval").sources) == 52


def test_files_in_place_of_sources(tmp_path: Path) -> None:
    card = catalog.load_benchmark("hmmt-2025")
    paths = [jsonl(tmp_path / f"{n}.jsonl", {"problem": f"{n}?", "answer": str(n)}) for n in range(3)]
    assert [source.path for source in local_sources(card, paths[:2])] == [str(path) for path in paths[:2]]
    assert len(local_sources(card, paths[:1])) == 1  # one file with all problems
    assert local_sources(card, []) == ()
    with pytest.raises(UserError, match="3 files for hmmt-2025, which has 2 sources"):
        local_sources(card, paths)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompts": []}, "prompts"),
        ({"prompts": {"kind": "file", "path": "a"}, "subsets": ["x"]}, "subsets needs `prompts` to be one source"),
        (
            {"prompts": [{"kind": "file", "path": "a"}, {"kind": "file", "path": "b", "task": "choice"}]},
            "sources of several tasks",
        ),
        ({"prompts": {"kind": "file", "path": "a", "weight": 1.0}}, "has a `weight`"),
        ({"prompts": [{"kind": "file", "path": "a", "pth": "b"}]}, r"prompts\.0\.pth: unknown key"),
        ({"prompts": {"kind": "file", "path": "a", "pth": "b"}}, r"prompts\.pth: unknown key"),
    ],
)
def test_cards_that_are_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_text(json.dumps({"name": "a"} | fields))
    with pytest.raises(UserError, match=message):
        catalog.load_benchmark(str(tmp_path / "card.yaml"))


def test_scores_by_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [
        jsonl(tmp_path / f"{name}.jsonl", *({"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in numbers))
        for name, numbers in {"feb": range(4), "nov": range(3, 8)}.items()  # one problem is in both
    ]
    card = {"name": "sums", "prompts": [{"kind": "file", "path": str(path)} for path in paths], "problems": 9}
    (tmp_path / "card.yaml").write_text(json.dumps(card))

    def reply(question: str, seed: int) -> tuple[str, str]:
        n = int(question.split()[2])
        return f"\\boxed{{{2 * n if n < 4 else 0}}}", "stop"

    with server(reply) as made:
        asked = ["eval", "--model", url(made), "--benchmark", tmp_path / "card.yaml", "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked) == 0
    row = scores(tmp_path / "out")
    parts = {name: (part.problems, part.pass_at_1.value) for name, part in row.parts.items()}
    assert parts == {"feb": (4, 1.0), "nov": (4, 0.0)}
    assert row.source["1.path"] == str(paths[1])
    assert "pass@1 by source" in capsys.readouterr().out


def test_sources_get_names_that_differ() -> None:
    card = catalog.load_benchmark
    assert source_names(card("olymmath").sources) == ["en-easy", "en-hard", "zh-easy", "zh-hard"]
    assert source_names(card("hmmt-2025").sources) == ["hmmt_feb_2025", "hmmt_nov_2025"]
    assert source_names([FilePrompts(kind="file", path=path) for path in ("a/x.jsonl", "b/x.jsonl")]) == [
        "a/x.jsonl",
        "b/x.jsonl",
    ]
    assert source_names(card("gsm8k").sources * 2) == ["source 0", "source 1"]


def test_decontamination_compares_bare_questions(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "quiz.jsonl", {"question": "Which?", "options": ["a", "b"], "answer": "A", "topic": "t"})
    source = {"kind": "file", "path": str(path), **OPTIONS, "template": "On {{topic}}:\n{{question}}\n{{options}}"}
    (tmp_path / "card.yaml").write_text(json.dumps({"name": "quiz", "prompts": [source, source | {"limit": 1}]}))
    recipe = catalog.load_recipe("tiny", [f"eval.benchmarks=[{tmp_path}/card.yaml]"])
    assert [item.question for item in RunResources(recipe).benchmark_items(())] == ["Which?"]
    recipe = catalog.load_recipe(
        "tiny", [f"eval.sources={{quiz: [{path}, {path}]}}", f"eval.benchmarks=[{tmp_path}/card.yaml]"]
    )
    assert [item.question for item in RunResources(recipe).benchmark_items(())] == ["Which?"]
