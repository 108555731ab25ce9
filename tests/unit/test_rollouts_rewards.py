"""Rewards of rollouts: every part by hand, unverifiable and truncated rollouts."""

import pytest
from filter_support import GOOD, make_trace

from distill.errors import UserError
from distill.objectives.grpo import Rewards
from distill.prompts.prompt import Prompt
from distill.train.rollouts.rewards import (
    Reward,
    Rewarder,
    check_gradable,
    language_consistency,
    overlong,
)

LIMIT = 100
CORRECT = Rewards()
HANS = "<think>\n所以 the sum is 42.\n</think>\n42"  # 2 of 13 characters of the reasoning are Han


def rewards(*traces, weights=CORRECT, **settings):
    with Rewarder(weights, LIMIT, **settings) as rewarder:
        return rewarder.rewards(traces)


def answered(answer, **more):
    return make_trace(f"<think>\n20 + 22\n</think>\n{answer}", **more)


def cut(answer, **more):
    return answered(answer, finish_reason="length", **more)


def test_the_graders_verdict_is_the_reward_in_the_order_of_the_rollouts():
    slow = answered("\\boxed{\\frac{84}{2}}")  # goes to a worker, the others do not
    assert rewards(slow, answered("\\boxed{41}"), answered("\\boxed{42}")) == [
        Reward(1.0, True, {"correct": 1.0}),
        Reward(0.0, False, {"correct": 0.0}),
        Reward(1.0, True, {"correct": 1.0}),
    ]


@pytest.mark.parametrize(
    "trace",
    [
        answered("I cannot say."),
        answered("There are 41 dollars for 3 people"),  # a guess of the grader
        make_trace(prompt=Prompt.from_question("20 + 22?", None)),
        make_trace(prompt=Prompt.from_question("20 + 22?", None), finish_reason="length"),
    ],
)
def test_an_unverifiable_rollout_has_no_value_whatever_else_it_would_earn(trace):
    (reward,) = rewards(trace, weights=Rewards(correct=1.0, format=1.0, language=1.0, length=1.0))
    assert (reward.value, reward.correct) == (None, None)
    assert "correct" not in reward.parts


@pytest.mark.parametrize(
    ("trace", "correct"),
    [
        (cut("\\boxed{42}"), True),
        (cut("\\boxed{42} and so"), True),
        (cut("\\boxed{41}"), False),
        (cut("The answer is 42"), False),  # it may have become 420
        (cut("\\boxed{42"), False),
        (cut(""), False),
        (make_trace("<think>\nso \\boxed{42}", finish_reason="length"), False),
        (make_trace("so \\boxed{42}", finish_reason="length"), False),  # all of it may be reasoning
    ],
)
def test_a_truncated_rollout_is_correct_only_if_its_answer_stands(trace, correct):
    assert rewards(trace) == [Reward(float(correct), correct, {"correct": float(correct)})]


@pytest.mark.parametrize(("answer", "correct"), [("B", True), ("The answer is C.", False)])
def test_other_tasks_have_their_own_graders(answer, correct):
    prompt = Prompt.from_question("Which?\nA. 1\nB. 2\nC. 3", "B", "choice")
    assert rewards(answered(answer, prompt=prompt))[0].correct is correct


def test_a_truncated_program_counts_once_its_block_is_closed():
    prompt = Prompt.from_question("Write f.", "assert f(1) == 2", "code")
    whole = "```python\ndef f(x):\n    return x + 1\n```"
    standing, open_ = rewards(cut(whole + "\nIt adds", prompt=prompt), cut(whole[:-3], prompt=prompt), level="process")
    assert (standing.correct, open_.correct) == (True, False)


@pytest.mark.parametrize(
    ("trace", "expected"),
    [
        (make_trace(GOOD), 1.0),
        (answered("42"), 1.0),
        (make_trace("The answer is \\boxed{42}."), 0.0),  # no block
        (make_trace("<think>\n</think>\n\\boxed{42}"), 0.0),  # nothing in it
        (make_trace("<think>\na\n</think>\n<think>\nb\n</think>\n\\boxed{42}"), 0.0),
        (make_trace("<think>\n\\boxed{42}\n</think>\n"), 0.0),  # no answer after it
        (answered("It is 42 dollars, or so I think"), 0.0),  # right, but not in the place of an answer
        (cut("\\boxed{42}"), 1.0),
        (cut("The answer is 42"), 0.0),
    ],
)
def test_format_is_one_closed_block_and_an_answer_in_its_place(trace, expected):
    (reward,) = rewards(trace, weights=Rewards(correct=0.0, format=0.5))
    assert reward == Reward(expected / 2, None, {"format": expected})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (GOOD, 1.0),
        (HANS, 1 - 2 / 13),
        ("<think>\n所以\n</think>\nthe sum is 42", 0.0),  # the answer is not measured
        ("所以 the sum is 42.", 1 - 2 / 13),  # no block: all of it
        ("<think>\n所以 the sum is 42.", 1 - 2 / 13),
        ("<think>\n\n</think>\n42", 0.0),
        ("", 0.0),
    ],
)
def test_language_is_the_share_of_characters_in_the_language_of_the_prompt(text, expected):
    question = "What is the sum of these numbers, and how do you find it: 20 + 22?"
    assert language_consistency(make_trace(text, question)) == pytest.approx(expected)


def test_sentences_in_another_language_are_inconsistent_too():
    german = "Zuerst addieren wir die beiden Zahlen, um die Summe zu finden."
    english = "First we add both of the numbers, because that is what the sum is."
    question = "What is the sum of these numbers, and how do you find it: 20 + 22?"
    consistency = language_consistency(make_trace(f"<think>\n{english} {german}\n</think>\n42", question))
    assert consistency == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(("tokens", "part"), [(0, 0), (80, 0), (90, -0.5), (95, -0.75), (100, -1), (101, -1)])
def test_the_length_part_falls_in_the_last_fifth_of_the_limit(tokens, part):
    assert overlong(tokens, 100) == pytest.approx(part)
    assert overlong(1, 1) == -1


def test_parts_are_weighted_and_summed():
    weights = Rewards(correct=1.0, format=0.5, language=0.1, length=0.2)
    (reward,) = rewards(make_trace(GOOD, tokens=90), weights=weights)
    assert reward.parts == {"correct": 1.0, "format": 1.0, "language": 1.0, "length": pytest.approx(-0.5)}
    assert reward.value == pytest.approx(1.0 + 0.5 + 0.1 - 0.1)


def test_one_rewarder_serves_many_steps_and_an_answer_that_hangs_the_parser():
    hanging = answered("\\boxed{9^{9^{9^9}}}")
    with Rewarder(Rewards(), LIMIT, workers=1, timeout=0.5) as rewarder:
        for _ in range(2):
            first, second, third = rewarder.rewards([hanging, answered("\\boxed{42}"), hanging])
            assert second.value == 1.0
            assert first == third and first.value in (0.0, None)
        assert rewarder.rewards([]) == []


def test_a_judge_grades_its_task_and_no_other():
    from distill.grading.grade import Grade

    class Judge:
        def grade(self, items, rubric=None):
            for key, _, response in items:
                yield key, Grade("correct" if response == "fine" else "wrong", "judged")

    prompt = Prompt.from_question("Write a line.", None, "judge")
    traces = [answered("fine", prompt=prompt), answered("\\boxed{42}"), answered("bad", prompt=prompt)]
    assert [reward.correct for reward in rewards(*traces, judge=Judge())] == [True, True, False]
    assert rewards(cut("fine", prompt=prompt), judge=Judge())[0].correct is False  # it could have gone on


# ---- before the first step

ASKED = Prompt.from_question("20 + 22?", "42")
UNANSWERED = Prompt.from_question("20 + 22?", None)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([UNANSWERED, UNANSWERED], "none of the 2 prompts of task math has a gold answer"),
        ([ASKED, Prompt.from_question("Hello", None, "chat")], "task 'chat' has no grader yet"),
        ([ASKED, Prompt.from_question("A or B?", " ", "choice")], "none of the 1 prompts of task choice"),
        ([Prompt.from_question("Write.", None, "judge")], "needs a model that judges"),
    ],
)
def test_prompts_that_could_never_be_rewarded_are_refused_in_one_line(prompts, message):
    with pytest.raises(UserError, match=message) as caught:
        check_gradable(prompts, Rewards())
    assert "\n" not in str(caught.value)
    check_gradable(prompts, Rewards(correct=0.0, format=1.0))  # then no answer is graded


def test_some_prompts_without_a_gold_answer_are_counted(capsys):
    check_gradable([ASKED, UNANSWERED, ASKED], Rewards())
    assert "1 of 3 prompts have no gold answer" in capsys.readouterr().out
    check_gradable([ASKED, Prompt.from_question("Write.", None, "judge")], Rewards(), has_judge=True)
    assert not capsys.readouterr().out
