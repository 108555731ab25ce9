"""Decontamination: terms and scores by hand, then 399 problems of GSM8K that a language model has rephrased."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from distill.errors import UserError
from distill.filters.base import Candidate, Resources
from distill.filters.decontaminate import THRESHOLD, Decontaminate
from distill.filters.overlap import SMOOTHING, WEIGHTS, Index, Item
from distill.filters.pipeline import STAGE
from distill.filters.resources import RunResources
from distill.filters.terms import stem_of, terms_of
from distill.pipeline import run_recipe
from distill.prompts.prompt import Prompt
from distill.recipe import Recipe
from distill.run import Run
from distill.traces.store import TraceStore, read_traces
from distill.traces.trace import Trace


def index(*questions: str) -> Index:
    return Index(Item(f"b/{number}", question) for number, question in enumerate(questions))


def test_numbers_have_one_spelling() -> None:
    written = ("$1,000.00", "1000", "1000.0", "a thousand")
    assert {terms_of(text).numbers for text in written} == {frozenset({"1000"})}
    assert terms_of("two-fifths of 40").numbers == terms_of("2/5 of forty").numbers == {"2", "5", "40"}
    assert terms_of("twice 3, and 3 again").numbers == {"2", "3", "3#2"}
    assert terms_of("1234567 and 1234568").numbers == {"1234567", "1234568"}, "digits, not floats"
    assert terms_of("007 or 0.50 or 0").numbers == {"7", "0.5", "0"}
    assert terms_of("1,2 and 3").numbers == {"1", "2", "3"}, "a list, no thousands"


def test_names_and_words() -> None:
    terms = terms_of("Janet's ducks lay eggs; she sells the eggs.")
    assert terms.names == {"janet"}
    assert terms.words == {"janet", "duck", "lay", "egg", "sell"}
    assert {stem_of(word) for word in ("sell", "sells", "selling")} == {"sell"}
    assert stem_of("as") == "as"


def test_a_score_by_hand() -> None:
    """A number and a word are shared, each in one of 500 assumed problems; `you` and `has` are function words."""
    problems = index("Ann has 17 pears.", "Bob has 5 plums.")
    match = problems.best("do you have 17 pears or cherries")
    weight = math.log(501 / 1.5)
    unknown = math.log(2 * 501)  # `cherries`, in none
    assert match is not None and match.item.name == "b/0" and not match.verbatim
    numbers = 2 * weight / (2 * weight + SMOOTHING)
    words = 2 * weight / (2 * weight + unknown + SMOOTHING)
    assert match.score == pytest.approx(WEIGHTS["numbers"] * numbers + WEIGHTS["words"] * words)
    assert match.shared == {"numbers": ["17"], "names": [], "words": ["pears"]}


def test_copies_are_found_in_longer_prompts_and_when_they_are_short() -> None:
    problems = index("What is 5 plus 7?", "Name the capital of France, which lies on the Seine.", "Yes?")
    for prompt, verbatim in {
        "What is 5 plus 7?": True,
        "Answer briefly: what is 5 plus 7? Thank you.": True,
        "What is 5 plus 8?": False,
        "NAME the capital of France, which lies on the Seine!": True,
        "Which capital of France lies on the Seine?": False,
    }.items():
        match = problems.best(prompt)
        assert match is not None and match.verbatim is verbatim, prompt
    rephrased = problems.best("Compute 5 plus 7.")
    assert rephrased is not None and rephrased.score > THRESHOLD, "fewer than eight words"
    other = problems.best("What is 5 plus 8?")
    assert other is not None and other.score < THRESHOLD
    assert problems.best("") is None and index().best("What is 5 plus 7?") is None


def test_a_prompt_that_is_a_problem_is_a_copy_however_short() -> None:
    for problem in ("Compute $7!$.", "$1+1$", "Evaluate $5!$", "Define entropy.", "\u4ec0\u4e48?", "?"):
        problems = index("Janet has 16 eggs; she eats three.", problem)
        match = problems.best(problem)
        assert match is not None and match.verbatim and match.item.question == problem
        assert (match := problems.best(f"{problem} And 3 - 2?")) is None or not match.verbatim
    assert (match := index("Compute $7!$.").best("Compute 7! ")) is not None and match.verbatim
    assert (match := index("Compute $7!$.").best("Compute 7.")) is None or not match.verbatim
    assert index("", "What is 5 plus 7?").best("") is None


FIRM = "A firm lowers its price and sells more units in a market."


@pytest.mark.parametrize(
    ("item", "prompt", "copied"),
    [
        ("Which of the following is true?", f"{FIRM} Which of the following is true?", False),
        (
            "Which of the following statements is correct?",
            f"{FIRM} Which of the following statements is correct?",
            False,
        ),
        ("What is the answer?", f"{FIRM} What is the answer?", False),
        ("Which of the following is true?", "Which of the following is true? A) Cats purr. B) Dogs bark.", False),
        ("Which of the following is true?", "Which of the following is true?", True),
        (r"Simplify $\sqrt{242}$", r"A side is 7 and another 9. First simplify $\sqrt{242}$.", False),
        (
            r"Simplify $\sqrt{242}$",
            r"Simplify $\sqrt{242}$. Please reason step by step, and box the final answer.",
            True,
        ),
        (
            "Name the capital of France, which lies on the Seine.",
            f"{FIRM} Name the capital of France, which lies on the Seine.",
            True,
        ),
        ("下列叙述正确的是", "某公司降价后销量上升,下列叙述正确的是", False),
        ("《红楼梦》的作者是谁", "请问红楼梦的作者是谁", True),
        ("中国的首都是哪座城市", "请问中国的首都是哪座城市?", True),
        ("小明有三个苹果", "题目:小明有3个苹果", True),
    ],
)
def test_a_short_problem_is_a_copy_where_the_rest_of_the_prompt_asks_nothing(
    item: str, prompt: str, copied: bool
) -> None:
    match = index(item).best(prompt)
    assert match is not None and match.verbatim is copied


@pytest.mark.parametrize(
    ("item", "prompt", "copied"),
    [
        ("What is 37 + 48 - 66?", "What is 37 - 48 + 66?", False),
        ("What is 37 + 48 - 66?", "Think step by step. What is 37 + 48 \u2212 66? Answer as x = y.", True),
        ("Solve $x^2 + 3x - 5 = 0$ for all real x.", "Solve $x^2 - 3x + 5 = 0$ for all real x.", False),
        ("Solve $x^2 + 3x - 5 = 0$ for all real x.", r"> **Solve** \(x^2+3x-5=0\) for all real x.", True),
        ("求方程 x^2-5x+6=0 的所有实数根", "求方程 x^2+5x-6=0 的所有实数根", False),
        ("求方程 x^2-5x+6=0 的所有实数根", "请问:求方程 x^2-5x+6=0 的所有实数根", True),
        ("Compute -5 times 3 plus 2", "Compute 5 times 3 plus 2", False),
        ("How many zeros has the number 25!", "How many zeros has the number 25", False),
    ],
)
def test_a_copy_has_the_operators_of_the_problem(item: str, prompt: str, copied: bool) -> None:
    match = index(item).best(prompt)
    assert match is not None and match.verbatim is copied


BAHIA = "What is the largest city of Brazil in the state of Bahia, and who founded it?"


@pytest.mark.parametrize(
    ("item", "prompt", "hit"),
    [
        ("What is the capital of France?", "What is the capital of Spain?", False),
        ("What is the capital of France?", "Name the capital city of France.", True),
        ("Who wrote Hamlet?", "Who wrote Macbeth?", False),
        ("Who wrote Hamlet?", "Which author wrote Hamlet?", True),
        ("What year was Marie Curie born?", "What year was Pierre Curie born?", False),
        ("What year was Marie Curie born?", "In what year was Curie born?", True),
        ("How many moons does Jupiter have?", "Jupiter has how many moons?", True),
        ("In which year did the Titanic sink?", "In what year did the Lusitania sink?", False),
        (BAHIA, BAHIA.replace("Bahia", "Parana"), False),
        (BAHIA, f"Answer in English. {BAHIA}", True),
        (
            "Ann has 17 pears and buys 5. How many has Ann?",
            "Today Bob has 17 pears and buys 5. How many has Bob?",
            True,
        ),
    ],
)
def test_a_short_question_about_another_name_is_another_question(item: str, prompt: str, hit: bool) -> None:
    match = index(item).best(prompt)
    assert (match is not None and (match.verbatim or match.score >= THRESHOLD)) is hit


def test_a_question_about_another_name_does_not_hide_the_problem_behind_it() -> None:
    problems = index("What is the capital of France?", "What is the capital of Spain?")
    match = problems.best("Name the capital city of Spain.")
    assert match is not None and match.item.name == "b/1" and match.score >= THRESHOLD
    lower = index("What is the capital of France?", "Who wrote Hamlet?", "What is the capital of Chile and Hamlet?")
    assert (found := lower.best("What is the capital of Hamlet?")) and found.item.name == "b/2"
    assert problems.best("What is the capital of Peru?") is None


def test_names_that_begin_a_sentence_are_not_certain() -> None:
    terms = terms_of("Hamlet: Tell me, who wrote it? Was it Shakespeare?")
    assert terms.names == {"hamlet", "tell", "shakespear"} and terms.certain_names == {"shakespear"}


def test_problems_without_spaces_are_compared_by_pairs_of_characters() -> None:
    assert terms_of("细胞膜的。叙述").words == {"细胞", "胞膜", "膜的", "叙述"}
    assert terms_of("膜").words == {"膜"} and terms_of("膜 abc 膜").tokens == ("膜", "abc", "膜")
    rephrased = index("下列关于细胞膜的叙述正确的是").best("请回答:下列关于细胞膜的叙述中,正确的是")
    other = index("下列关于细胞膜的叙述正确的是").best("请回答:下列关于细胞核的叙述中,正确的是")
    assert rephrased is not None and other is not None and other.score < THRESHOLD <= rephrased.score


@pytest.mark.parametrize(
    ("numeral", "value"),
    [
        *(("十", "10"), ("十二", "12"), ("二十五", "25"), ("一百零三", "103"), ("两千", "2000"), ("三万二千", "32000")),
        *(("二\u3007二四", "2024"), ("一亿", "100000000"), ("九", "9")),
    ],
)
def test_chinese_numerals(numeral: str, value: str) -> None:
    assert terms_of(f"他有{numeral}个苹果").numbers == terms_of(f"他有{value}个苹果").numbers == {value}


def test_characters_that_are_no_numerals() -> None:
    assert terms_of("一个苹果重5千克").numbers == {"5"}


def test_rephrased_problems_of_gsm8k(real_data: Callable[[str], Path]) -> None:
    """The threshold was chosen with the first 200 pairs; the others and the training set show what it is worth."""

    def rows(name: str) -> list[dict[str, str]]:
        return [json.loads(line) for line in real_data(name).read_text(encoding="utf-8").splitlines()]

    items = [row["question"] for row in rows("gsm8k/test.jsonl")]
    assert len(items) == 1319
    problems = index(*items)

    def is_hit(question: str, gold: str | None = None) -> bool:
        match = problems.best(question)
        assert match is not None
        return (match.verbatim or match.score >= THRESHOLD) and gold in (None, match.item.question)

    pairs = rows("decontam_gsm8k_rephrase_dev/pairs.jsonl")
    recall = [
        sum(is_hit(pair["rephrased"], pair["original"]) for pair in half) / len(half)
        for half in (pairs[:200], pairs[200:])
    ]
    negatives = [row["question"] for row in rows("gsm8k/train_sample1000.jsonl")]
    false_positives = sum(map(is_hit, negatives)) / len(negatives)
    assert recall[0] >= 0.95 and recall[1] >= 0.95, recall
    assert false_positives <= 0.01
    assert all(is_hit(question, question) for question in items), "every copy is found"


# ---- in a run


def trace(question: str) -> Trace:
    return Trace(
        Prompt.from_question(question, "42"), 0, 0, "<think>a</think>\\boxed{42}", "a", "\\boxed{42}", "stop", "t"
    )


def recipe(decontaminate: object, **evaluation: object) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "r",
            "teacher": "tiny-r1",
            "student": "tiny-qwen",
            "prompts": [{"kind": "procedural", "name": "arithmetic"}],
            "filter": {"decontaminate": decontaminate},
            "eval": {"benchmarks": ["tiny-arithmetic"]} | evaluation,
        }
    )


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.jsonl"
    path.write_text('{"problem": "Ann picks 17 pears and 25 plums. How many fruits has she?", "answer": "42"}\n')
    return path


def test_contaminated_prompts_are_dropped_with_evidence(tmp_path: Path, problems: Path) -> None:
    with Run(tmp_path / "run", recipe({"benchmarks": [str(problems)]})) as run:
        run.paths.traces.mkdir()
        with TraceStore(run.paths.traces) as store:
            store.append([trace("Ann has 25 plums and picks 17 pears. What is the sum?"), trace("20 + 22?")])
        assert STAGE.perform(run).kept == 1
        [(_, verdicts)] = read_traces(run.paths.dropped)
    [verdict] = [verdict for verdict in verdicts if verdict.filter == "decontaminate"]
    assert verdict.reason == "rephrased"
    assert verdict.evidence["item"] == "held-out/0"
    assert verdict.evidence["shared"] == {
        "numbers": ["17", "25"],
        "names": ["Ann"],
        "words": ["pears", "picks", "plums"],
    }
    assert str(verdict.evidence["question"]).startswith("Ann picks 17 pears")


def test_the_recipe_s_own_benchmarks_are_the_default(problems: Path) -> None:
    own = recipe(True, benchmarks=["math-500"], sources={"math-500": str(problems)})
    assert [item.name for item in RunResources(own).benchmark_items(())] == ["math-500/0"]
    assert own.filter_settings()["decontaminate.benchmarks"] == ["math-500"]
    assert recipe({"benchmarks": ["a"]}).filter_settings()["decontaminate.benchmarks"] == ["a"]


def test_unusable_benchmarks_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    (tmp_path / "answers.jsonl").write_text('{"solution": "42"}\n')
    for number, (name, message) in enumerate(
        {
            str(tmp_path / "answers.jsonl"): r"no column with questions \(question, problem, prompt, text\)",
            "gsm9k": "did you mean gsm8k",
        }.items()
    ):
        with Run(tmp_path / f"run-{number}", recipe({"benchmarks": [name]})) as run:
            run.paths.traces.mkdir()
            with TraceStore(run.paths.traces) as store:
                store.append([trace("20 + 22?")])
            with pytest.raises(UserError, match=f"^filter.decontaminate: .*{message}"):
                STAGE.perform(run)
            assert not run.paths.filtered.exists()


def test_generate_alone_refuses_a_benchmark_that_is_not_there(tmp_path: Path) -> None:
    """Before the teacher is opened: this one does not exist."""
    for name, message in {"gsm9k": "did you mean gsm8k", str(tmp_path / "none.jsonl"): "none.jsonl"}.items():
        with pytest.raises(UserError, match=f"^filter.decontaminate: .*{message}"):
            run_recipe(recipe({"benchmarks": [name]}), tmp_path / "run", ["generate"])
        assert not (tmp_path / "run").exists()


def test_only_a_run_has_benchmarks() -> None:
    with pytest.raises(LookupError):
        Decontaminate().judge(Candidate(trace("20 + 22?"), Resources()))
