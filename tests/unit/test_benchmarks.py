"""Shipped benchmark cards on rows of the published form, and what a card of one's own may say."""

import json
from collections.abc import Callable
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
from distill.prompts import Prompt, PromptCounts, load_prompts
from distill.recipe import BenchmarkCard, Eval
from distill.recipe.sources import FilePrompts, HubPrompts

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
    "mbpp": {
        "task_id": 601,
        "text": "Write a function to add one.",
        "code": "def add_one(x): return x + 1",
        "test_list": ["assert add_one(1) == 2", "assert add_one(2) == 3"],
        "test_setup_code": "",
        "challenge_test_list": [],
    },
    "mbpp-plus": {
        "task_id": 2,
        "prompt": "Write a function to add one.",
        "code": "def add_one(x): return x + 1",
        "test_imports": [],
        "test_list": ["assert add_one(1) == 2", "assert add_one(2) == 3"],
        "test": "for n in range(9):\n    assert add_one(n) == n + 1",
    },
    "livecodebench": {
        "question_title": "A. One",
        "question_content": "Read a number, print the next.",
        "platform": "atcoder",
        "contest_date": "2024-08-01T00:00:00",
        "starter_code": "",
        "difficulty": "easy",
        "public_test_cases": '[{"input": "1", "output": "2", "testtype": "stdin"}]',
        "private_test_cases": '[{"input": "8", "output": "9", "testtype": "stdin"}]',
        "metadata": "{}",
    },
}
GOLDS = {
    "mmlu": "B",
    "mmlu-redux": "B",
    "mmlu-pro": "J",
    "arc-challenge": "B",
    "c-eval": "B",
    "mbpp": '{"language": "python", "test_cases": [{"type": "assert", "code": "assert add_one(1) == 2"}, '
    '{"type": "assert", "code": "assert add_one(2) == 3"}]}',
    "mbpp-plus": '{"language": "python", "test_cases": [{"type": "program", "code": "for n in range(9):\\n    '
    'assert add_one(n) == n + 1"}]}',
    "livecodebench": '{"language": "python", "test_cases": [{"type": "stdin_stdout", "input": "1", "output": "2"}, '
    '{"type": "stdin_stdout", "input": "8", "output": "9"}]}',
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
    columns = ("problem", "question", "prompt", "text", "question_content")
    assert next(str(row[name]) for name in columns if name in row) in prompt.messages[-1]["content"]


@pytest.mark.parametrize("name", ["mbpp", "mbpp-plus"])
def test_the_prompt_of_mbpp_shows_its_tests(name: str, tmp_path: Path) -> None:
    (prompt,) = prompts_of(catalog.load_benchmark(name), tmp_path / "rows.jsonl", ROWS[name])
    assert prompt.messages[-1]["content"] == (
        "Write a function to add one.\n\nYour code should pass these tests:\n\n"
        "assert add_one(1) == 2\nassert add_one(2) == 3"
    )


def test_every_problem_of_mbpp_and_humaneval_names_its_function(real_data: Callable[[str], Path]) -> None:
    for name, path in (("mbpp", "mbpp_dev/mbpp.jsonl"), ("humaneval", "humaneval/HumanEval.jsonl")):
        counts = PromptCounts()
        list(load_prompts(local_sources(catalog.load_benchmark(name), [real_data(path)]), counts))
        assert counts.rows.total() > 160 and not counts.unnamed, name


def problems_of_livecodebench(directory: Path, *days: str) -> list[Path]:
    row = ROWS["livecodebench"]
    return [
        jsonl(directory / f"test{n}.jsonl", row | {"question_content": f"Problem {n}.", "contest_date": day})
        for n, day in enumerate(days)
    ]


def test_a_card_of_one_source_takes_any_number_of_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    days = ("2024-07-31", "2024-08-01", "2025-02-01", "2025-02-02")
    paths = problems_of_livecodebench(tmp_path, *days)
    card = catalog.load_benchmark("livecodebench").model_copy(update={"problems": 2})
    for number in (1, 3, 4):
        sources = {card.name: tuple(map(str, paths[:number]))}
        benchmark = Benchmark.of(card, Eval(benchmarks=(card.name,), sources=sources))
        assert benchmark.settings()["prompts.since"] == "2024-08-01"
        if number == 1:
            with pytest.raises(UserError, match="livecodebench has no problems"):
                benchmark.prompts  # noqa: B018  read at its first use
        else:
            questions = [prompt.messages[-1]["content"].strip() for prompt in benchmark.prompts]
            assert questions == ["Problem 1.", "Problem 2."]
    assert capsys.readouterr().err == ""  # the rows outside the window are no reason for a note
    with pytest.raises(UserError, match="test0.jsonl twice"):
        local_sources(card, [paths[0], paths[0]])
    cut = Benchmark.of(card, Eval(benchmarks=(card.name,), sources={card.name: tuple(map(str, paths[:2]))}))
    with pytest.raises(UserError, match="livecodebench has 1 problems but its card says 2"):
        cut.prompts  # noqa: B018  read at its first use


def test_files_of_a_dataset_with_a_script(tmp_path: Path) -> None:
    paths = problems_of_livecodebench(tmp_path, "2024-08-01", "2024-08-02", "2025-02-02")
    (tmp_path / "code_generation_lite.py").write_text("raise SystemExit('never run')")
    card = catalog.load_benchmark("livecodebench")
    assert isinstance(card.prompts, HubPrompts) and card.prompts.files[-1] == "test5.jsonl"
    local = card.prompts.model_copy(update={"dataset": str(tmp_path), "files": tuple(path.name for path in paths)})
    prompts = list(load_prompts([local]))
    assert [prompt.messages[-1]["content"].strip() for prompt in prompts] == ["Problem 0.", "Problem 1."]
    assert {prompt.source for prompt in prompts} == {tmp_path.name}
    missing = local.model_copy(update={"files": ("other.jsonl",)})
    with pytest.raises(UserError, match="other.jsonl: no such file"):
        list(load_prompts([missing]))
    with pytest.raises(ValidationError, match="files excludes `subset` and `split`"):
        HubPrompts(kind="hub", dataset="a/b", files=("a.jsonl",), split="test")


def test_a_window_without_problems(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", {"question": "1+1?", "answer": "2", "day": "2024-01-01"})
    source = FilePrompts(kind="file", path=str(path), date="day", since="2024-02-01")
    counts = PromptCounts()
    assert list(load_prompts([source], counts)) == []
    assert counts.notes() == [f"{tmp_path.name}/a.jsonl: all 1 problems are outside the window of `since` and `until`"]


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


# ---- what a card may say


OPTIONS = {"options": "options", "task": "choice"}


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
        ({"answer_is": "letter"}, "answer_is needs `options`"),
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
    assert benchmark.settings()["prompts.task"] == "math"  # of files of one form, whose number may grow
    assert catalog.check("benchmark", str(tmp_path / "card.yaml")) == []


def test_a_limit_takes_problems_of_each_source_in_turns(tmp_path: Path) -> None:
    """Sources of 1, 4 and 2 problems: 0a, 1a 1b 1c 1d, 2a 2b. A higher limit keeps the problems of a lower one."""
    names = {0: "a", 1: "abcd", 2: "ab"}
    paths = [
        jsonl(tmp_path / f"{n}.jsonl", *({"question": f"{n}{letter}", "answer": "1"} for letter in letters))
        for n, letters in names.items()
    ]
    sources = [{"kind": "file", "path": str(path)} for path in paths]
    card = BenchmarkCard.model_validate({"name": "sums", "prompts": sources, "problems": 7})

    def asked(limit: int | None) -> list[str]:
        benchmark = Benchmark.of(card, Eval(benchmarks=("sums",), limit=limit))
        problems = {prompt.id: prompt.messages[-1]["content"] for prompt in benchmark.prompts}
        parts = {name: [problems[each] for each in ids] for name, ids in benchmark.parts.items()}
        assert all(each.startswith(name) for name, part in parts.items() for each in part)
        return list(problems.values())

    assert asked(2) == ["0a", "1a"]
    assert asked(3) == ["0a", "1a", "2a"]
    assert asked(5) == ["0a", "1a", "1b", "2a", "2b"]
    assert asked(6) == ["0a", "1a", "1b", "1c", "2a", "2b"]
    assert asked(7) == asked(99) == asked(None) == ["0a", "1a", "1b", "1c", "1d", "2a", "2b"]
    sizes = [Benchmark.of(card, Eval(benchmarks=("sums",), limit=limit)).sizes for limit in (None, 3)]
    assert sizes == [[1, None, None, None, None], [1, 3, None, None, None, "in turns"]]
    (tmp_path / "2.jsonl").write_text((tmp_path / "1.jsonl").read_text(encoding="utf-8").splitlines()[0] + "\n")
    assert asked(4) == ["0a", "1a", "1b", "1c"], "a problem of two sources is asked once"


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


def test_repeated_problems_are_noted(tmp_path: Path) -> None:
    rows = ({"question": question, "answer": "2"} for question in ("1+1?", "1+1?", "3-1?"))
    path = jsonl(tmp_path / "a.jsonl", *rows)
    card = BenchmarkCard.model_validate({"name": "sums", "prompts": {"kind": "file", "path": str(path)}})
    benchmark = Benchmark.of(card, Eval(benchmarks=("sums",)))
    assert benchmark.notes == ["sums: 1 of 3 problems repeat another; each is asked once"]


def test_a_benchmark_without_a_file_is_refused() -> None:
    with pytest.raises(UserError, match="eval.sources: math-500 names no file"):
        Benchmark.of(catalog.load_benchmark("math-500"), Eval(benchmarks=("math-500",), sources={"math-500": ()}))


def test_a_file_is_offered_only_in_place_of_a_dataset_of_the_hub(tmp_path: Path) -> None:
    """A card that reads a file has one already, and so has a benchmark that was given a file."""
    for source, offered in (
        ({"kind": "hub", "dataset": str(tmp_path / "gone")}, True),
        ({"kind": "file", "path": str(tmp_path / "gone.jsonl")}, False),
    ):
        card = BenchmarkCard.model_validate({"name": "sums", "prompts": source})
        with pytest.raises(UserError, match="gone") as error:
            Benchmark.of(card, Eval(benchmarks=("sums",))).prompts  # noqa: B018  read at its first use
        assert ("--source sums=FILE" in str(error.value)) is offered


def test_a_recipe_replaces_the_sampling_of_the_card():
    card = catalog.load_benchmark("gsm8k")
    greedy = Benchmark.of(card, Eval(benchmarks=("gsm8k",), temperature=0.0, max_new_tokens=512))
    assert (greedy.sampling.temperature, greedy.sampling.top_p, greedy.sampling.max_new_tokens) == (0.0, 0.95, 512)
    assert greedy.settings()["sampling.temperature"] == 0.0 and card.sampling.temperature == 0.6
    wide = Benchmark.of(card, Eval(benchmarks=("gsm8k",), temperature=1.0, top_p=1.0))
    assert (wide.sampling.temperature, wide.sampling.top_p, wide.max_new_tokens) == (1.0, 1.0, 32768)
    with pytest.raises(UserError, match="gsm8k: at temperature 0 all 2 answers to a problem are the same; set"):
        Benchmark.of(card, Eval(benchmarks=("gsm8k",), temperature=0.0, samples=2))
