"""A judge's verdict in the text of its answer."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distill.grading.verdicts import LONGEST, Words, read_verdict, scale_of
from distill.recipe.judge import Judge
from distill.recipe.rubric import Rubric

RUBRIC = Rubric(prompt="{{response}}")
WORDS = Words(RUBRIC.accepted, RUBRIC.rejected)
SCORES = Words(RUBRIC.accepted, RUBRIC.rejected, min_score=7)

# What each of the 48 real judgements states, as a person reads them. The 22nd reasons to the end of its answer, and
# states no verdict. `expected_judgement` in the file is what would have been right, not what the judge says.
STATED = "NYYNNNNNYNNY" + "NYYYYNYYY-NY" + "NYYYYNYNYNNY" + "YYYYYNNNYNNN"


def letter(text, words=WORDS, **more):
    return {True: "Y", False: "N", None: "-"}[read_verdict(text, words, **more).accepted]


def test_real_judgements(real_data):
    path = real_data("judge_outputs_nemo/answer_judge.jsonl")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert "".join(letter(row["judgement"]) for row in rows) == STATED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Judgement: Yes", "Y"),
        ("Judgment: no.", "N"),
        ("**Judgement:** Yes (they are the same)", "Y"),
        ("**Judgement: No**", "N"),
        ("## Judgement\n\nso it is.\n\nVerdict: correct", "Y"),
        ("Since both are equal, the judgement is:\nYes.", "Y"),
        ("The final verdict is **incorrect**.", "N"),
        ("reasoning: they match\n\ncorrect: yes\n\nconfidence: 90", "Y"),
        ("Grade: A", "Y"),
        ("Grade: B: INCORRECT", "N"),
        ("Grade: NOT_ATTEMPTED", "N"),
        ("A", "Y"),
        ("C", "N"),
        ("CORRECT", "Y"),
        ("My reasoning.\n\n[[A]]", "Y"),
        ("My reasoning: [[B]]", "N"),
        ("So [[Yes]]. Judgement: Yes", "Y"),
        ('{"reason": "same", "judgement": "No"}', "N"),
        ('Here it is:\n```json\n{"correct": true}\n```', "Y"),
        ('{"is_correct": false}', "N"),
        (r"The answers differ: \boxed{\text{No}}", "N"),
        ("No\n\nThey are different.", "N"),
        ("They are the same.\n\nYes.", "Y"),
        ("Judgement: not equivalent", "N"),
        ("Score: 1", "-"),
        ("They may be the same.", "-"),
        ("", "-"),
        ("Verdict: no doubt about it", "-"),
        ("Grade: A good answer", "-"),
        ("Judgement: a", "-"),
        ("Judgement: Yes/No", "-"),
        ("Judgement: Yes\n\nOn reflection I am not sure. Judgement: No, they differ.\nDone.", "-"),
        ("At first: Judgement: Yes\nBut 2 is not 3.\nJudgement: No", "N"),
        ('I write "Judgement: Yes" or "Judgement: No".\n\nJudgement: Yes', "Y"),
        ("[[A]] or [[B]]?", "-"),
        ("Judgement (Yes/No): No", "N"),
        (r"Judgement: \boxed{No}", "N"),
        ('{"judgement": "No", "correct": true}', "-"),
        # sentences about the response, before or after the verdict
        ("Judgement: No\n\nThe response's final answer is A.", "N"),
        ("No\nThe response's final answer is A.", "N"),
        ("Judgement: Yes\nThe student's final answer is B.", "Y"),
        ("The student's final answer is B.\nJudgement: Yes\nIts grade is B.", "Y"),
        ("Judgement: No\nExplanation: its final result is correct.", "N"),
        ("Judgement: No\n\nThe reference (correct): A", "N"),
        ("**No**\n\nThe intermediate result is correct.", "N"),
        ("No\n\nThe student's answer \\boxed{A} differs from it.", "N"),
        ("No\n\nIts decision is right.", "-"),
        ("No, it is not the same.\n\nA", "Y"),
        ("No\n\nThe student chose\nA", "-"),
        ("The response's final answer is A.", "-"),
        ("The student's answer is \\boxed{A}, as it should be.", "-"),
        ("The final answer is correct.", "Y"),
        ("So the result is wrong.", "N"),
        # no letter of the rubric
        ("Grade: A-", "-"),
        ("Grade: B+", "-"),
        ("**Grade:** A\u2212", "-"),
        ("Judgement: Yes|No", "-"),
        ("| Judgement: Yes | same |", "Y"),
        ("Judgement: Yes--they are the same.", "Y"),
        # quotations of the response or the prompt
        ("The response's own final line is 'Judgement: Yes'. The response is wrong.", "-"),
        ('The response says "Verdict: Yes", which is wrong.', "-"),
        ('The response ends "so my verdict: Yes", but it is wrong.', "-"),
        ("It claims `Judgement: Yes`, but it is wrong.", "-"),
        ('The response says "Verdict: Yes" but it is wrong.\n\nJudgement: No', "N"),
        ('"Judgement: Yes"', "Y"),
        ("`Judgement: No`.", "N"),
        ('Judgement: "Yes"', "Y"),
        ('{"reason": "a "quote" within", "judgement": "No"}', "N"),
    ],
)
def test_forms(text, expected):
    assert letter(text) == expected


@pytest.mark.parametrize(
    ("text", "finished", "expected", "problem"),
    [
        ("<think>Judgement: No? Yes?</think>\nJudgement: Yes", True, "Y", None),
        ("So judgement: no</think>Judgement: Yes", True, "Y", None),
        ("<think>Judgement: Yes", False, "-", "the judge was cut off"),
        ("<think>Judgement: Yes", True, "-", "no verdict"),
        ("<think>a</think>\nJudgement: Yes\n\nbecause", False, "Y", None),
        ("Maybe. Judgement: Yes. Or is it? Let me", False, "-", "the judge was cut off"),
        ("Judgement: No\n\nReasoning: the predicted", False, "N", None),
        ("<think>a</think>", True, "-", "no verdict"),
        ("Yes\n\nJudgement: No", True, "N", None),
        ("Judgement: Yes. Judgement: No.", True, "-", "contradictory verdicts"),
    ],
)
def test_reasoning_judges(text, finished, expected, problem):
    assert letter(text, finished=finished) == expected
    assert read_verdict(text, WORDS, finished).problem == problem


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Score: 7", "Y"),
        ("Rating: [[6.5]]", "N"),
        ("[[10]]", "Y"),
        ("Score: 8/10", "Y"),
        ("**Score:** -1", "N"),
        ('{"score": 9}', "Y"),
        ("7", "Y"),
        ("Judgement: Yes", "-"),
        ('{"correct": true}', "-"),
        ("Score: -8", "N"),
        ("Score: \u22128", "N"),
        ("-8", "N"),
        ("Score: .9", "N"),
        (".9", "N"),
        ('{"score": 1e-7}', "N"),
        ('{"score": NaN}', "-"),
        ("Score: 8-9", "-"),
        ("Score: 8\u20139", "-"),
        ("Score: 7,5", "-"),
        ("Score (1-10): 8", "Y"),
        ("Rating [out of 10]: 6", "N"),
        ("Score: 8 out of 10", "Y"),
        ("Score: 2 out of 10", "N"),
        ("8 / 10", "Y"),
        ("Score: 2\nThe final answer is 42.", "N"),
        ("3\nIts result is 42.", "N"),
        ("The response's result is 42.", "-"),
        ("The answer is \\boxed{42}.", "-"),
        ("The score is 8.", "Y"),
        # another scale, or no single number
        ("Score: 70/100", "-"),
        ("Score: 80%", "-"),
        ("Score: 80 %", "-"),
        ('{"score": 80}', "-"),
        ('{"score": "80%"}', "-"),
        ("Score: 4/5", "-"),
        ("Score: 0.8/1", "-"),
        ("Score: 11/10", "-"),
        ("Score: >8", "-"),
        ("Score: < 8", "-"),
        ("Score: >=8", "-"),
        ('{"score": ">8"}', "-"),
        ("Score: <8>", "Y"),
        ("Score: ~8", "Y"),
    ],
)
def test_scores(text, expected):
    assert letter(text, SCORES) == expected


@pytest.mark.parametrize(
    ("prompt", "text", "expected"),
    [
        ("Give a score from 1 to 10.", "Score: 8", "Y"),
        ("Give a score from 1 to 10.", "Score: 8/10", "Y"),
        ("Give a score from 1 to 10.", "Score: 8/20", "-"),
        ("Give a score from 1 to 10.", "Score: 40/50", "-"),
        ("Give a score from 1 to 10.", "Score: 12", "-"),
        ("Give a score (0-20).", "Score: 12", "Y"),
        ("Give a score out of 10.", '{"score": 60}', "-"),
        ("Give 1 (bad) to 10 (good).", "Score: 11", "-"),
        ("Give a score from 1 to 10, of 3 and 12.", "Score: 8/20", "Y"),
    ],
)
def test_a_score_is_on_the_scale_of_the_prompt(prompt, text, expected):
    words = Words(RUBRIC.accepted, RUBRIC.rejected, min_score=7, scale=scale_of(prompt, 7))
    assert letter(text, words) == expected


def test_other_words():
    words = Words(("tie", "assistant A"), ("assistant B",))
    assert [letter(f"[[{said}]]", words) for said in ("TIE", "Assistant A", "assistant_b", "Yes")] == [
        "Y",
        "Y",
        "N",
        "-",
    ]


@given(st.text(st.sampled_from('[]{}":*\n Judgement: Yes No A 7 \\boxed</think>'), max_size=200))
def test_any_text_has_a_reading(text):
    reading = read_verdict(text, WORDS)
    assert (reading.accepted is None) == (reading.problem is not None)


def test_long_text_takes_linear_time():
    """The longest texts that are searched, of the kinds that make searches quadratic; the test would not end."""
    units = ("judgement is ", "[[", "{", "```json\n{", "\\boxed{", "grade:***", "score: 5 ", "\\text{")
    starts = ("[[", "score:", "score: 5", "```", "grade (", "\\text", "final answer is")
    for text in (*(unit * (LONGEST // len(unit)) for unit in units), *(f"{start}{{}}x" for start in starts)):
        for gap in (" ", "\n", "\t"):
            read_verdict(text.replace("{}", gap * (LONGEST - 20)), WORDS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": "Good?"}, "prompt has no {{response}}"),
        ({"prompt": "{{response}} {{gold}}"}, "prompt has {{gold}}; known are {{question}}, {{answer}}, {{response}}"),
        ({"prompt": "{{response}}", "accepted": ["Yes"], "rejected": ["yes"]}, "accepted and rejected both have 'yes'"),
        ({"prompt": "{{response}}", "accepted": []}, "accepted is empty"),
    ],
)
def test_rubrics_that_are_refused(fields, message):
    with pytest.raises(ValueError) as refusal:
        Rubric.model_validate_json(json.dumps(fields))
    assert message in str(refusal.value)


def test_a_judge_is_somewhere():
    with pytest.raises(ValueError, match="one of `teacher` and `server`"):
        Judge()
    with pytest.raises(ValueError, match="the hours of a judge are not counted"):
        Judge.model_validate({"teacher": "x", "budget": {"hours": 1.0}})
