"""`distill eval --model`: one model without a recipe, on a server that follows a script; also on files of real data."""

import json

import pytest
from eval_support import Script, distill, right, scores, server, sums, url

from distill import catalog
from distill.eval.samples import vote_of
from distill.evaluations import GradeRow
from distill.grading import Grader
from distill.grading.math import final_answer, gold_answer
from distill.grading.votes import classes
from distill.prompts import Prompt

__all__ = ["sums"]


def test_a_server_is_scored(sums, tmp_path, monkeypatch, capsys):
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--published", "Somebody") == 0
        assert len(made.asked) == 16 and len({a["seed"] for a in made.asked}) == 16
        assert made.asked[0]["messages"][-1]["content"].endswith("?\n\nBox it.")
        row = scores(tmp_path / "out")
        assert row.pass_at_1.value == 1 and row.no_answer_rate == 0 and row.truncated_rate == 0
        assert row.mean_completion_tokens == 7
        assert (row.median_reasoning_tokens, row.reasoning_unit) == (2, "words")
        assert row.pass_at_k[2].value == row.consensus_at_k[2].value == 1
        assert "published for Somebody: pass@1 55.0%, outside the interval of scripted, cons@64 60.0%" in (
            capsys.readouterr().out
        )
        assert distill(monkeypatch, *asked, "--samples", 3) == 0, "more samples extend it"
        assert len(made.asked) == 24
        assert distill(monkeypatch, *asked, "--set", "max_new_tokens=99") == 2
        assert "drawn with other settings (sampling.max_new_tokens: 32768 → 99)" in capsys.readouterr().err


def test_cut_off_reasoning_is_truncated_and_no_answer(sums, tmp_path, monkeypatch):
    with server(lambda question, seed: (("and so on and", ""), "length")) as made:
        assert distill(monkeypatch, "eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out") == 0
    row = scores(tmp_path / "out")
    assert row.truncated_rate == row.no_answer_rate == row.unverifiable_rate == 1 and row.pass_at_1.value == 0
    assert row.consensus_at_k[2].silent == 8


def test_votes_count_equal_answers_together(sums, tmp_path, monkeypatch):
    """Of four samples of a problem two are right, spelled in two ways, and two wrong, in two ways that differ."""
    turn: dict[str, int] = {}

    def four(question, seed):
        n = int(question.split()[2])
        turn[question] = turn.get(question, -1) + 1
        spelled = [str(2 * n), f"\\frac{{{4 * n}}}{{2}}", str(2 * n + 1), str(2 * n + 3)]
        return f"\\boxed{{{spelled[turn[question]]}}}", "stop"

    with server(four) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out", "--samples", 4]
        assert distill(monkeypatch, *asked) == 0
    row = scores(tmp_path / "out")
    assert row.pass_at_1.value == 0.5 and row.consensus_at_k[4].value == 1 and row.consensus_at_k[4].ties == 0
    assert row.pass_at_k[2].value == pytest.approx(5 / 6)


@pytest.mark.parametrize("order", [("50\\%", "0.5", "50"), ("0.5", "50\\%", "50"), ("0.5", "50", "50\\%")])
def test_unequal_answers_share_no_class(order):
    """50 % equals 0.5 and 50, which are not equal: all three in one class would elect one of the two by the other."""
    with Grader(workers=1) as grader:
        ((_, numbers),) = classes(grader, {"p": [*order, "1/2", "7"]})
    assert numbers["0.5"] == numbers["1/2"] != numbers["50"]
    assert numbers["7"] not in (numbers["0.5"], numbers["50"])
    assert numbers["50\\%"] in (numbers["0.5"], numbers["50"])


@pytest.mark.parametrize(
    ("response", "vote"),
    [
        ("So \\boxed{7}.", "7"),
        ("I am not sure, but the answer is probably somewhere near 7 apples for them", None),
        ("We count them.\nThere are 7 of them in all", None),
    ],
)
def test_a_guess_does_not_vote(response, vote):
    """As in `distill.eval.metrics.ConsensusAtK`, which asks the answer itself whether it is marked."""
    with Grader(workers=1) as grader:
        ((_, grade),) = grader.grade([(0, Prompt.from_question("?", "7"), response)])
    row = GradeRow("p", 0, grade.verdict, grade.reason, grade.evidence, "stop", 1, 0)
    assert row.answer and vote_of(row) == vote
    assert final_answer(response).marked == (vote is not None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "give a recipe, or --model with --benchmark and --out"),
        (["--model", "nowhere", "--benchmark", "SUMS", "--out", "OUT"], "nowhere is not a model directory"),
        (["--model", "http://127.0.0.1:9/v1", "--benchmark", "SUMS", "--out", "OUT"], "no model server answers there"),
        (["--model", "x", "--out", "OUT"], "(--benchmark missing)"),
        (["tiny", "--model", "x"], "give either RECIPE or --model"),
        (["tiny", "--samples", "2"], "--samples needs --model"),
        (["--model", "x", "--benchmark", "SUMS", "--out", "OUT", "--published", "Nobody"], "the cards have Somebody"),
        (["--model", "x", "--benchmark", "SUMS", "--out", "OUT", "--source", "sums"], "write it as NAME=FILE"),
        (
            ["--model", "x", "--benchmark", "SUMS", "--out", "OUT", "--source", "more=x.jsonl"],
            "eval.sources names more, which is not evaluated",
        ),
    ],
)
def test_wrong_input_is_one_line(arguments, message, sums, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    places = {"SUMS": str(sums), "OUT": "out"}
    assert distill(monkeypatch, "eval", *(places.get(argument, argument) for argument in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists(), "nothing is left half-written"


def test_a_name_stays_below_the_directory(sums, tmp_path, monkeypatch, capsys):
    base = catalog.folder("student") / "tiny-qwen"
    for name in ("../../escaped", "a/b", ".hidden"):
        asked = ["eval", "--model", base, "--benchmark", sums, "--out", tmp_path / "out", "--name", name]
        assert distill(monkeypatch, *asked) == 2 and "it becomes a directory's name" in capsys.readouterr().err
    assert not (tmp_path / "escaped").exists()


def test_settings_may_change_until_something_is_drawn(sums, tmp_path, monkeypatch, capsys):
    """A server that refuses the first request leaves no samples, and so nothing that others could be mixed with."""
    made: list[int] = [400]
    with server(lambda question, seed: made[0] if made[0] == 400 else right(question, seed)) as one:
        asked = ["eval", "--model", url(one), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked) == 2 and "correct the sampling settings" in capsys.readouterr().err
        made[0] = 200
        assert distill(monkeypatch, *asked, "--set", "max_new_tokens=64") == 0
        assert distill(monkeypatch, *asked) == 2
        assert "choose another --out" in capsys.readouterr().err


def test_problems_without_an_answer_are_refused(sums, tmp_path, monkeypatch, capsys):
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n) if n else None} for n in range(8)]
    (tmp_path / "holes.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/holes.jsonl") == 2
        assert "1 problems have no answer to compare with" in capsys.readouterr().err


def test_a_file_may_move_and_grow(sums, tmp_path, monkeypatch):
    rows = [json.dumps({"question": f"What is {n} + {n}?", "answer": str(2 * n)}) + "\n" for n in range(8)]
    for name, count in (("few.jsonl", 3), ("more.jsonl", 8)):
        (tmp_path / name).write_text("".join(rows[:count]))
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--limit", 3, "--source", f"sums={tmp_path}/few.jsonl") == 0
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/more.jsonl") == 0
        assert len(made.asked) == 16, "what was answered is not asked again"
    assert scores(tmp_path / "out").source["path"] == str(tmp_path / "more.jsonl")


def test_a_card_is_checked_with_its_file(sums, tmp_path, monkeypatch, capsys):
    assert distill(monkeypatch, "benchmarks", "check", sums) == 0
    (tmp_path / "sums.jsonl").unlink()
    assert distill(monkeypatch, "benchmarks", "check", sums) == 2 and "sums.jsonl" in capsys.readouterr().err


def test_another_number_of_problems_is_refused(sums, tmp_path, monkeypatch, capsys):
    (tmp_path / "fewer.jsonl").write_text(json.dumps({"problem": "What is 1 + 1?", "answer": "2"}) + "\n")
    with server(right) as made:
        asked = ["eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/fewer.jsonl") == 2
        assert "has 1 problems but its card says 8" in capsys.readouterr().err
        assert distill(monkeypatch, *asked, "--source", f"sums={tmp_path}/fewer.jsonl", "--limit", 1) == 0


def test_tokens_that_nobody_counted_are_not_none(sums, tmp_path, monkeypatch, capsys):
    def without(self, content, status=200):
        content.pop("usage", None)
        whole(self, content, status)

    whole = Script.send_json
    monkeypatch.setattr(Script, "send_json", without)
    with server(right) as made:
        assert distill(monkeypatch, "eval", "--model", url(made), "--benchmark", sums, "--out", tmp_path / "out") == 0
    assert scores(tmp_path / "out").mean_completion_tokens is None and "–" in capsys.readouterr().out


REAL = {
    "gsm8k": ("gsm8k/test.jsonl", 1319),
    "math-500": ("math500/test.jsonl", 500),
    "aime-2024": ("aime24_with_solutions/test.jsonl", 30),
    "aime-2025": ("aime24_25_prompts/aime25.jsonl", 30),
    "amc-2023": ("amc23/test.jsonl", 40),
}


@pytest.mark.one_in(7)
@pytest.mark.parametrize("benchmark", REAL)
@pytest.mark.parametrize("kind", ["reference", "cut off"])
def test_real_benchmarks_with_a_scripted_server(benchmark, kind, real_data, tmp_path, monkeypatch):
    """The reference answers are all correct, before any parser; text that is cut off is truncated, all of it."""
    file, count = REAL[benchmark]
    path = real_data(file)
    gold = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question = next(row[name] for name in ("problem", "question", "prompt") if name in row)
        gold[question.strip()] = gold_answer(str(row["answer"]))
    monkeypatch.setattr("distill.eval.benchmark.unreadable_golds", lambda *_: ([], 0))  # its workers are not counted
    if kind == "reference":
        monkeypatch.setattr("distill.grading.grader.WorkerPool.map", refuse)

    def reply(question, seed):
        if kind == "cut off":
            return "Let us think about", "length"
        found = next((known for known in gold if question.startswith(known)), None)
        return f"<think>\nhm\n</think>\nThe answer is \\boxed{{{gold[found]}}}.", "stop"

    with server(reply) as made:
        asked = ["eval", "--model", url(made), "--benchmark", benchmark, "--out", tmp_path / "out"]
        assert distill(monkeypatch, *asked, "--samples", 1, "--source", f"{benchmark}={path}") == 0
        assert all(a["messages"][-1]["content"].count("Please reason step by step") == 1 for a in made.asked)
    row = scores(tmp_path / "out", benchmark)
    assert row.problems == count
    if kind == "reference":
        assert row.pass_at_1.value == 1 and row.unverifiable_rate == 0
    else:
        assert row.truncated_rate == 1 and row.pass_at_1.value == 0


def refuse(pool, items):
    """In place of the workers: nothing may come to them."""
    assert not list(items), "an identical answer was sent to a parser"
    return iter(())
