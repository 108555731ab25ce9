"""`distill traces`: which traces are shown, what is said of them, and the diff of a kept and a dropped one."""

from dataclasses import replace

import pytest

from distill.cli import main
from distill.evaluations import DrawnWith, EvaluationPaths, GradeRow
from distill.prompts import Prompt
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore, write_traces
from distill.traces.trace import Trace, Verdict

QUESTION = Prompt.from_question("What is 6 × 7?", "42")
OTHER = Prompt.from_question("What is 1 + 1?", "2")


def trace(prompt, sample, answer, steps=3):
    reasoning = "\n".join(f"step {i} of {answer}" for i in range(steps))
    response = f"The answer is {answer}."
    text = f"<think>\n{reasoning}\n</think>\n{response}"
    return Trace(prompt, sample, 0, text, reasoning, response, "stop", "t", (1,), (1, 2, 3))


@pytest.fixture
def run(tmp_path):
    kept, wrong = trace(QUESTION, 0, "42"), trace(QUESTION, 1, "41", steps=20)
    right = [Verdict("correct", True, "identical", {"extracted": "42"})]
    write_traces(tmp_path / "filtered" / "kept", [kept], {kept.key: right})
    said = [Verdict("correct", False, "wrong", {"extracted": "41", "gold": "42"})]
    write_traces(tmp_path / "filtered" / "dropped", [wrong], {wrong.key: said})
    return tmp_path


def shown(monkeypatch, capsys, *arguments, code=0):
    monkeypatch.setattr("sys.argv", ["distill", "traces", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        main()
    output = capsys.readouterr()
    assert ended.value.code == code, output.err
    return output.err if code else output.out


def test_traces_by_verdict(run, monkeypatch, capsys):
    everything = shown(monkeypatch, capsys, run)
    assert everything.index("The answer is 42.") < everything.index("The answer is 41.")
    assert "gold answer: 42" in everything
    assert "12 lines; --whole shows them" in everything, "twenty, less four at each end"
    for asked in ("dropped", "correct: wrong", "correct", "Dropped", "CORRECT: w"):
        dropped = shown(monkeypatch, capsys, run, "--verdict", asked)
        assert "41" in dropped and "The answer is 42." not in dropped
        assert "dropped correct: wrong  extracted 41, gold 42" in dropped
    assert "The answer is 41." not in shown(monkeypatch, capsys, run, "--verdict", "kept")
    assert shown(monkeypatch, capsys, run, "--search", "STEP 19") == shown(
        monkeypatch, capsys, run, "--verdict", "dropped"
    )
    assert "no trace matches" in shown(monkeypatch, capsys, run, "--search", "nowhere")
    assert "step 9 of 41" in shown(monkeypatch, capsys, run, "--whole", "--verdict", "dropped")


def test_the_answers_of_an_evaluation(tmp_path, monkeypatch, capsys):
    paths = EvaluationPaths(tmp_path)
    right, wrong, new = (trace(QUESTION, sample, answer) for sample, answer in enumerate(("42", "41", "40")))
    DrawnWith(settings={}).write(paths.settings)
    with TraceStore(paths.traces) as store, Ledger(paths.grades) as grades:
        store.append([right, wrong, new])
        for sample, verdict, answer in ((0, "correct", "42"), (1, "wrong", "41")):
            evidence = {"extracted": answer, "gold": "42", "method": "boxed"}
            row = GradeRow(QUESTION.id, sample, verdict, f"because {verdict}", evidence, "stop", 3, 1)
            grades.append([row.to_row()])
    assert "  wrong: because wrong  extracted 41, gold 42, method boxed\n" in shown(monkeypatch, capsys, tmp_path)
    only = shown(monkeypatch, capsys, tmp_path, "--verdict", "Wrong")
    assert (
        f"sample 1 · wrong · 3 {tmp_path.name} tokens\n" in only and "sample 0" not in only and "sample 2" not in only
    )
    counted = shown(monkeypatch, capsys, tmp_path, "--counts")
    assert [line.split() for line in counted.splitlines()[2:5]] == [
        ["correct", "1"],
        ["wrong", "1"],
        ["not", "graded", "1"],
    ]
    difference = shown(monkeypatch, capsys, tmp_path, "--prompt", QUESTION.id, "--diff")
    assert "--- sample 0, correct" in difference and "+++ sample 1, wrong" in difference


def test_a_directory_of_evaluations_names_one(tmp_path, monkeypatch, capsys):
    place = tmp_path / "gsm8k" / "student"
    place.mkdir(parents=True)
    (place / "scores.json").write_text("{}")
    assert f"give one of its evaluations, such as {place}" in shown(monkeypatch, capsys, tmp_path, code=2)


def test_counts(run, monkeypatch, capsys):
    lines = shown(monkeypatch, capsys, run, "--counts").split("\n")
    assert [line.split() for line in lines if "kept" in line or "wrong" in line] == [
        ["kept", "1"],
        ["correct:", "wrong", "1"],
    ]


def test_diff(run, monkeypatch, capsys):
    made = shown(monkeypatch, capsys, run, "--prompt", QUESTION.id[:6], "--diff")
    assert "--- sample 0, kept" in made and "+++ sample 1, correct: wrong" in made
    assert "-The answer is 42." in made and "+The answer is 41." in made


def test_control_characters_of_a_trace_do_not_reach_the_terminal(tmp_path, monkeypatch, capsys):
    nasty = "\x1b]0;title\x07\x1b[2J \r \x9b31m \u202e end\ta"
    kept = replace(trace(QUESTION, 0, "42"), text=f"<think>{nasty}</think>{nasty}", reasoning=nasty, response=nasty)
    dropped = replace(trace(QUESTION, 1, "41"), text=nasty, reasoning=None, response=nasty)
    verdicts = {
        kept.key: [Verdict("correct", True, "correct", {"extracted": nasty})],
        dropped.key: [Verdict("correct", False, f"unverifiable: {nasty}", {})],
    }
    write_traces(tmp_path / "filtered" / "kept", [kept], verdicts)
    write_traces(tmp_path / "filtered" / "dropped", [dropped], verdicts)
    for options in ((), ("--whole",), ("--counts",), ("--diff", "--prompt", QUESTION.id)):
        output = shown(monkeypatch, capsys, tmp_path, *options)
        assert not set(output) & set("\x1b\x07\r\x9b\u202e")
        assert "\\x1b[2J" in output
        assert "end\ta" in output or "--counts" in options


def test_lengths_name_their_unit(tmp_path, monkeypatch, capsys):
    counted = trace(OTHER, 0, "2")
    imported = replace(counted, sample=1, completion_token_ids=(), completion_tokens=None)
    with TraceStore(tmp_path / "traces") as store:
        store.append([counted, imported])
    heads = [line for line in shown(monkeypatch, capsys, tmp_path).splitlines() if " · " in line]
    assert heads[0].endswith("sample 0 · not filtered · 3 teacher tokens")
    assert heads[1].endswith(f"sample 1 · not filtered · {len(imported.text.split())} words")


def test_a_run_that_was_not_filtered(tmp_path, monkeypatch, capsys):
    with TraceStore(tmp_path / "traces") as store:
        store.append([trace(OTHER, 0, "2")])
    assert "not filtered" in shown(monkeypatch, capsys, tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["RUN", "--diff"], "name it with --prompt ID"),
        (["RUN", "--diff", "--prompt", "zz"], "no trace of a prompt zz"),
        (["RUN", "--diff", "--prompt", "a", "--whole", "--search", "b"], "leave out --search and --whole"),
        (["RUN", "--diff", "--prompt", "a", "--verdict", "kept"], "leave out --verdict"),
        (["RUN", "--diff", "--prompt", "a", "--counts"], "leave out --counts"),
        (["RUN", "--counts", "--whole"], "leave out --whole"),
        (["RUN/none"], "no such directory"),
        (["EMPTY"], "no traces here; `distill generate RECIPE` makes"),
    ],
)
def test_wrong_input_is_one_line(arguments, message, run, monkeypatch, capsys):
    (run / "empty").mkdir()
    places = {"RUN": run, "RUN/none": run / "none", "EMPTY": run / "empty"}
    error = shown(monkeypatch, capsys, *(places.get(argument, argument) for argument in arguments), code=2)
    assert message in error and error.count("\n") == 1
