"""IFEval's instructions: each check by hand, strict and loose accuracy, and a benchmark from the card to the table."""

import json

import pytest
from eval_support import distill, scores, server, url

from distill.errors import UserError
from distill.eval.samples import sample_of
from distill.eval.statistics import Followed, Sample, share_of_parts, summarise, wilson
from distill.evaluations import GradeRow
from distill.grading import GRADERS, Grader, readable, require_grader
from distill.grading.instruction_checks import CHECKS, variants
from distill.grading.instructions import problem_of
from distill.prompts import Prompt

LESS, LEAST = {"relation": "less than"}, {"relation": "at least"}

CASES = [  # instruction, arguments, a text that follows it, a text that does not
    ("keywords:existence", {"keywords": ["cat", "dog"]}, "A Dog, a CAT.", "A dog."),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2} | LEAST, "Cat, cats.", "One cat."),
    ("keywords:frequency", {"keyword": "cat", "frequency": 2} | LESS, "One cat.", "Cat, cats."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "Many cats.", "A Cat."),
    (
        "keywords:letter_frequency",
        {"letter": "A", "let_frequency": 3, "let_relation": "at least"},
        "banana",
        "bonana",
    ),
    ("language:response_language", {"language": "de"}, "Das ist ein deutscher Satz mit Wörtern.", "An English text."),
    ("length_constraints:number_sentences", {"num_sentences": 2} | LEAST, "Dr. Smith ran. He won.", "Dr. Smith ran."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n***\n\n***\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na *** b\n***", "a\n\nb"),
    ("length_constraints:number_words", {"num_words": 3} | LESS, "two words", "don't count so"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "well"},
        'Yes.\n\n"Well," he said.',
        "Well.\n\nYes.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [address]", "[name]\naddress]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP. S. Thanks.", "Bye. PS thanks"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Bye.\np.p.s one more", "P.S. Thanks."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n  - b", "* a\n** b\n"),
    ("detectable_format:constrained_response", {}, "Hm. My answer is maybe. Really.", "My answer is perhaps."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and *b*", "*a* and * *"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na\nSection b",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', "{'a': 1}"),
    ("detectable_format:title", {}, "<<A title>>\ntext", "<< >>\ntext"),
    ("combination:two_responses", {}, "a\n******\nb", "a\n******\na"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hello."}, "say hello. Hello!", "Hello!"),
    ("startend:end_checker", {"end_phrase": "The end."}, 'So it is. "The end."', "The end. Or not."),
    ("startend:quotation", {}, ' "Quoted." ', '"'),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "less than"},
        "NASA, it is.",
        "NASA's USA",
    ),
    ("change_case:english_capital", {}, "THIS IS AN ENGLISH SENTENCE.", "THIS IS an ENGLISH SENTENCE."),
    ("change_case:english_lowercase", {}, "this is an english sentence.", "dies ist ein deutscher satz mit wörtern."),
    ("punctuation:no_comma", {}, "No; none.", "Yes, one."),
]


def test_every_instruction_has_a_case():
    assert {name for name, *_ in CASES} == CHECKS.keys()


@pytest.mark.parametrize(("name", "arguments", "yes", "no"), CASES)
def test_each_instruction(name, arguments, yes, no):
    gold = json.dumps([{"id": name} | arguments])
    assert problem_of(gold) is None
    assert CHECKS[name].follows(yes, arguments)
    assert not CHECKS[name].follows(no, arguments)


def test_the_language_of_a_text_without_letters_cannot_be_wrong():
    assert CHECKS["language:response_language"].follows("123", {"language": "fr"})


def test_the_variants_of_a_response():
    assert variants("Sure:\n**a**\nb\nBye.") == [
        "Sure:\n**a**\nb\nBye.",
        "**a**\nb\nBye.",
        "Sure:\n**a**\nb",
        "**a**\nb",
        "Sure:\na\nb\nBye.",
        "a\nb\nBye.",
        "Sure:\na\nb",
        "a\nb",
    ]


def gold(*names, **arguments):
    return json.dumps([{"id": name} | arguments for name in names])


def prompt(answer):
    return Prompt.from_question("Do it.", answer, "instructions")


def test_grades_strict_and_loose():
    both = gold("punctuation:no_comma", "startend:quotation")
    responses = {
        "strict": '"No comma here"',
        "loose": 'Sure, here it is:\n"No comma here"',
        "half": "No comma here",
        "empty": " \n",
    }
    with Grader(workers=1) as grader:
        grades = dict(grader.grade((name, prompt(both), text) for name, text in responses.items()))
    outcomes = {
        name: (grade.verdict, grade.evidence.get("strict"), grade.evidence.get("loose"))
        for name, grade in grades.items()
    }
    assert outcomes == {
        "strict": ("correct", [True, True], [True, True]),
        "loose": ("wrong", [False, False], [True, True]),
        "half": ("wrong", [True, False], [True, False]),
        "empty": ("unverifiable", None, None),
    }


def test_a_response_that_takes_too_long_to_check_is_unverifiable():
    with Grader(workers=1, timeout=1.0) as grader:
        ((_, grade),) = grader.grade([(0, prompt(gold("detectable_format:title")), "<<" + "<" * 200_000)])
    assert (grade.verdict, grade.reason) == ("unverifiable", "timeout")


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("nonsense", "instructions are not JSON"),
        ("[]", "no instructions"),
        (gold("keywords:magic"), "unknown instruction keywords:magic"),
        (gold("length_constraints:number_words", num_words=3), "length_constraints:number_words lacks relation"),
        (
            gold("length_constraints:number_words", num_words=3, relation="about"),
            "length_constraints:number_words has an unknown relation",
        ),
        (gold("keywords:existence", keywords="cat"), "keywords:existence lacks keywords"),
        (
            gold("detectable_format:number_bullet_lists", num_bullets=1.5),
            "detectable_format:number_bullet_lists lacks num_bullets",
        ),
    ],
)
def test_instructions_that_cannot_be_checked_are_unverifiable(answer, reason):
    assert GRADERS["instructions"].compare(answer, "text", True) == ("unverifiable", reason)
    assert not readable("instructions", answer)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr("distill.grading.instructions.find_spec", lambda name: None if name == "nltk" else object())
    with pytest.raises(
        UserError, match=r"benchmark x: checking instructions needs nltk; .*pip install 'distill\[ifeval\]'"
    ):
        require_grader("instructions", "benchmark x")


# ---- statistics


def test_a_share_of_parts_by_hand():
    """Four problems with 1, 2, 2 and 3 parts, of which 1, 1, 0 and 3 are true: 5 of 8."""
    parts = [[True], [True, False], [False, False], [True] * 3]
    estimate = share_of_parts(parts)
    p = 5 / 8
    spread = (1 - p) ** 2 + (1 - 2 * p) ** 2 + (2 * p) ** 2 + (3 - 3 * p) ** 2
    effect = (spread + 0.125 * 2) / (8 * p * (1 - p) + 0.125)
    assert estimate.value == p
    assert estimate.effective == pytest.approx(8 / effect)
    assert (estimate.low, estimate.high) == pytest.approx(wilson(p, 8 / effect))


def test_one_part_a_problem_is_plain_wilson():
    estimate = share_of_parts([[True]] * 7 + [[False]] * 3)
    assert estimate.effective == pytest.approx(10)
    assert share_of_parts([[True, True]] * 10).effective == pytest.approx(10), "all true: a problem is a trial"
    with pytest.raises(ValueError, match="at least one part of every problem"):
        share_of_parts([[True], []])


def test_the_four_accuracies_by_hand():
    rows = [((True, True), (True, True)), ((True, False), (True, True)), ((False,), (False,))]
    samples = [
        Sample(str(i), "correct" if all(strict) else "wrong", True, False, 1, 0, followed=Followed(strict, loose))
        for i, (strict, loose) in enumerate(rows)
    ]
    statistics = summarise(samples, votes=False)
    four = statistics.instructions
    assert four is not None
    assert four.prompt_strict == statistics.pass_at_1
    assert [each.value for each in (four.prompt_strict, four.prompt_loose)] == pytest.approx([1 / 3, 2 / 3])
    assert [each.value for each in (four.instruction_strict, four.instruction_loose)] == pytest.approx([3 / 5, 4 / 5])
    assert summarise(samples + samples, votes=False).consensus_at_k == {}


def test_a_problem_that_cannot_be_checked_follows_nothing():
    """Two checked problems of two instructions, one of three unknown ones, one whose instructions cannot be read."""
    gold = json.dumps([{"id": "ours:unknown"}] * 3)
    evidence = [{"strict": [True, True], "loose": [True, True]}, {"strict": [True, False], "loose": [True, False]}]
    rows = [
        GradeRow(str(n), 0, "correct" if n == 0 else "unverifiable", "", given, "stop", 1, 0)
        for n, given in enumerate([*evidence, {"gold": gold}, {"gold": "nonsense"}])
    ]
    four = summarise([sample_of(row, {}) for row in rows], votes=False).instructions
    assert four is not None
    assert four.prompt_strict.value == pytest.approx(1 / 4)
    assert four.instruction_strict.value == pytest.approx(3 / (2 + 2 + 3 + 1))
    assert summarise([sample_of(row, {}) for row in rows[3:]], votes=False).instructions is None


# ---- from a file to the table


def test_ifeval_from_a_file(tmp_path, monkeypatch, capsys):
    rows = [
        {
            "key": n,
            "prompt": f"Question {n}",
            "instruction_id_list": ["punctuation:no_comma"] * (n + 1),
            "kwargs": [{}] * (n + 1),
        }
        for n in range(3)
    ]
    path = tmp_path / "ifeval.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replies = {"Question 0": "Fine", "Question 1": "Sure, here:\nfine", "Question 2": ""}

    def reply(question, seed):
        text = replies[question]
        return (text, "stop") if text else (("thinking", ""), "length")

    with server(reply) as made:
        asked = ["eval", "--model", url(made), "--benchmark", "ifeval", "--source", f"ifeval={path}"]
        assert distill(monkeypatch, *asked, "--limit", 3, "--samples", 2, "--out", tmp_path / "out") == 0
    row = scores(tmp_path / "out", "ifeval")
    four = row.instructions
    assert four is not None and row.consensus_at_k == {} and row.parts == {}
    assert [each.value for each in (four.prompt_strict, four.prompt_loose)] == pytest.approx([1 / 3, 2 / 3])
    assert [each.value for each in (four.instruction_strict, four.instruction_loose)] == pytest.approx([1 / 6, 3 / 6])
    assert row.no_answer_rate == pytest.approx(1 / 3)
    out = capsys.readouterr().out
    assert "instructions" in out and "16.7%" in out
    table = out[out.index("Scores on ifeval") : out.index("scores: ")]
    assert max(len(line) for line in table.splitlines() if not line.startswith("note: ")) <= 80
