"""What a person sees of rollouts: the report's curves and time, the trace reader by step, the plan's figures."""

import re
import shutil
from dataclasses import replace

import pytest
from report_support import begin_run
from test_traces_browse import OTHER, QUESTION, shown, trace
from transformers import Qwen2Config

from distill import catalog
from distill.artefacts import RunPaths
from distill.errors import UserError
from distill.objectives import Grpo, OnPolicy
from distill.plan.hardware import parse
from distill.plan.rollouts import (
    RolloutPlan,
    answers_of,
    decoding_rate,
    estimate_rollouts,
    stages_of,
    stored_bytes,
)
from distill.plan.traces import Traces
from distill.planned import Expected
from distill.recipe import Train
from distill.report import write_report
from distill.report.curves import Spent, curves, time_spent
from distill.traces.ledger import Ledger
from distill.traces.rewarded import REWARDS, Reward, read_rewards
from distill.traces.store import TraceStore
from distill.train.ranks import memory
from distill.train.rollouts.memory import CPU_CACHE, engines

GRPO = "train.objective={kind: grpo, rollouts: {prompts_per_step: 2, samples: 2, updates: 2}}"


def line(step, **figures):
    return {"step": step, "loss": -0.1, "learning_rate": 1e-4, "entropy": 0.5, "kl": 0.0, **figures}


LOG = [
    line(2, correct=0.25, reward=0.25, length=40.0, truncated=0.5, repetition=0.0, skipped_groups=0.5)
    | {"seconds_sync": 0.5, "seconds_rollouts": 2.0, "seconds_scoring": 1.0},
    line(6, correct=0.0, reward=0.3, length=50.0, truncated=0.0, repetition=0.0, skipped_groups=0.5)
    | {"seconds_sync": 0.5, "seconds_rollouts": 3.0, "seconds_scoring": 1.0},
]


REWARDED = {
    (QUESTION.id, 0): Reward(1.25, True, {"correct": 1.0, "language": 0.5}),
    (QUESTION.id, 1): Reward(-0.5, False, {"correct": 0.0, "length": -0.5}),
    (OTHER.id, 0): Reward(None, None, {"language": 1.0}),
}


@pytest.fixture
def run(tmp_path):
    """Two sets of two prompts with two samples each, trained on in steps 1 to 4."""
    begin_run(tmp_path, catalog.load_recipe("tiny", [GRPO]))
    with TraceStore(RunPaths(tmp_path).rollouts) as store:
        for prompt in (QUESTION, OTHER):
            store.append([replace(trace(prompt, sample, f"{sample}!"), teacher="student") for sample in range(4)])
        store.append([replace(trace(OTHER, 4, "long"), finish_reason="length")])
    with Ledger(RunPaths(tmp_path).rollouts / REWARDS) as ledger:
        ledger.append(reward.to_row(key) for key, reward in REWARDED.items())
    RunPaths(tmp_path).log.parent.mkdir(parents=True)
    with Ledger(RunPaths(tmp_path).log) as ledger:
        ledger.append(LOG)
    return tmp_path


def training(objective):
    return Train.model_validate({"objective": objective})


# ---- curves


def test_rewards_entropy_and_length_have_figures_of_their_own():
    rollouts, loss = curves(LOG, training({"kind": "grpo"}), "-2")
    assert (rollouts.name, loss.name) == ("rollouts-2", "loss-2")
    assert "pass@1 0.25 to 0, reward 0.25 to 0.3" in rollouts.caption
    assert "cut off at the token limit 50 to 0" in rollouts.caption
    assert "KL from the base" not in rollouts.caption, "it has no weight, and is 0"
    assert "entropy" in rollouts.svg["wide"] and "entropy" not in loss.svg["wide"]
    same = [row | {"reward": row["correct"]} for row in LOG]
    assert "pass@1, also the reward" in curves(same, training({"kind": "grpo"}))[0].svg["wide"]
    assert curves([], training({"kind": "grpo"})) == []


def test_divergence_by_position_is_named_by_its_tokens():
    """Eighths of 100 tokens: 12.5 each. The last is reached by one step of three, and is not drawn."""
    means = [[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, None], [0.5, 1, 1, 1, 1, 1, 2.0, 9.0], [0.5, 1, 1, 1, 1, 1, 2.0, None]]
    log = [line(i + 1, kl_by_position=row, kl=0.3) for i, row in enumerate(means)]
    objective = {"kind": "on_policy", "rollouts": {"sampling": {"max_new_tokens": 100}}}
    rollouts, by_position, _ = curves(log, training(objective))
    assert "divergence from the teacher, nats per token: 0.3 to 0.3" in rollouts.caption
    assert by_position.name == "kl"
    for text in ("1 – 13 1 to 0.5", "39 – 50 4 to 1", "76 – 88 7 to 2"):
        assert text in by_position.caption
    assert "89 – 100" not in by_position.caption


def test_the_time_of_a_training_by_hand():
    """Sets end at steps 2, 4 and 6: one before the first line, two before the second."""
    rollouts = Grpo.model_validate({"kind": "grpo", "rollouts": {"updates": 2}}).rollouts
    expected = {"weights to the engine": 1.5, "rollouts": 8.0, "scoring": 3.0, "training": 7.5}
    assert {each.what: each.seconds for each in time_spent(LOG, rollouts, 20.0)} == expected
    assert time_spent(LOG, rollouts, 20.0)[1] == Spent("rollouts", 8.0, 0.4)
    assert [each.share for each in time_spent(LOG, rollouts, None)] == [None] * 3


def test_the_last_set_of_a_finished_training_may_have_fewer_steps():
    """Steps 1 to 5 of sets of two: one set before the first line, and two before the last once it is finished."""
    rollouts = Grpo.model_validate({"kind": "grpo", "rollouts": {"updates": 2}}).rollouts
    log = [LOG[0], {**LOG[1], "step": 5}]
    assert [time_spent(log, rollouts, seconds)[1].seconds for seconds in (20.0, None)] == [8.0, 5.0]


def test_a_part_of_a_first_rollout_is_none(tmp_path):
    begin_run(tmp_path, catalog.load_recipe("tiny", [GRPO]))
    place = RunPaths(tmp_path).rollouts
    place.mkdir()
    (place / "ledger.jsonl").write_text('{"prompt": {"id"')
    assert "The student wrote" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_the_page_shows_rollouts_by_step(run):
    page = write_report(run).read_text(encoding="utf-8")
    assert "The student wrote 9 answers, 27 tokens in all, 3 on average." in page
    for step in ("steps 1 – 2", "steps 3 – 4", "steps 5 – 6"):
        assert f"<option>{step}" in page
    assert sorted(path.name for path in (run / "report").iterdir()) == [
        f"{name}.{kind}" for name in ("loss", "rollouts") for kind in ("png", "svg")
    ]
    assert "Where the time went" in page


def test_the_page_shows_the_best_and_the_worst_by_their_rewards(run):
    """The first set has two rewards and an unverifiable answer; the middle and last sets have no rewards yet."""
    page = " ".join(write_report(run).read_text(encoding="utf-8").split())
    _, _, section = page.partition("Best and worst answers by their rewards</h4>")
    section = section[: section.index('<h2 id="reading">')]
    assert "Steps 1 – 2: mean reward 0.375 of 2 answers, 1 unverifiable" in section
    assert "Steps 3 – 4: no rewards yet" in section and "Steps 5 – 6: no rewards yet" in section
    badges = re.findall(r'<span class="badge (good|bad)">([^<]*)</span>', section)
    assert badges == [("good", "reward 1.25"), ("bad", "reward -0.5")], "no trace is both"
    assert section.index("Reward 1.25: correct 1, language 0.5") < section.index("Reward -0.5: correct 0, length -0.5")
    reading = page[page.index("What the student wrote while it was trained") :]
    assert reading.count("No reward: unverifiable; language 1") == 1
    assert reading.count('<p class="gold">Reward ') == 2


def test_a_reward_of_nothing_has_no_sign():
    assert Reward(-0.0, False, {"correct": 0.0, "length": -0.0}).text == "reward 0: correct 0, length 0"


def test_equal_rewards_have_no_best(run):
    with Ledger(RunPaths(run).rollouts / REWARDS) as ledger:
        ledger.append(Reward(0.5, None, {"length": 0.5}).to_row((prompt.id, 4)) for prompt in (OTHER,))
    page = " ".join(write_report(run).read_text(encoding="utf-8").split())
    assert "Steps 5 – 6: mean reward 0.5 of 1 answers, all alike" in page


# ---- reading


def test_rollouts_are_read_by_step(run, monkeypatch, capsys):
    for step in (3, 4):
        heads = [
            text for text in shown(monkeypatch, capsys, run, "--rollouts", "--step", step).splitlines() if " · " in text
        ]
        assert heads == [
            f"{prompt.id}, sample {n} · steps 3 – 4 · ended · 3 student tokens"
            for prompt in (QUESTION, OTHER)
            for n in (0, 1)
        ]
    assert "The answer is 2!." in shown(monkeypatch, capsys, run, "--rollouts", "--step", 3)
    assert "The answer is 2!." not in shown(monkeypatch, capsys, run, "--rollouts", "--step", 2)
    cut = shown(monkeypatch, capsys, run, "--rollouts", "--verdict", "truncated")
    assert cut.count("gold answer") == 1 and "steps 5 – 6 · truncated" in cut
    table = shown(monkeypatch, capsys, run, "--rollouts", "--counts").splitlines()
    assert [row.split() for row in table if row.startswith("steps")] == [
        ["steps", "1", "–", "2", "4", "3", "0", "0.375"],
        ["steps", "3", "–", "4", "4", "3", "0", "–"],
        ["steps", "5", "–", "6", "1", "3", "1", "–"],
    ]


def test_rewards_are_read_with_their_parts(run, monkeypatch, capsys):
    text = shown(monkeypatch, capsys, run, "--rollouts", "--step", 1)
    lines = [line.strip() for line in text.splitlines() if "reward" in line]
    assert lines == [
        "reward 1.25: correct 1, language 0.5",
        "reward -0.5: correct 0, length -0.5",
        "no reward: unverifiable; language 1",
    ]
    shutil.rmtree(run / "stages")
    begin_run(run, catalog.load_recipe("tiny", [GRPO.replace("grpo", "on_policy")]))
    text = shown(monkeypatch, capsys, run, "--rollouts", "--step", 1)
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    assert lines == ["  correct", "  wrong", "  unverifiable"], "what is not trained on is no reward"


def test_a_reward_is_read_as_it_was_written(tmp_path):
    path = tmp_path / REWARDS
    assert list(read_rewards(path)) == []
    rewards = {("a", 3): Reward(0.1 + 0.2, True, {"correct": 1.0}), ("b", 0): Reward(None, None)}
    with Ledger(path) as ledger:
        ledger.append(reward.to_row(key) for key, reward in rewards.items())
        ledger.append([Reward(9.0, None).to_row(("a", 3))])  # of a session that was killed and repeated
    assert dict(read_rewards(path)) == rewards
    with Ledger(path) as ledger:
        ledger.append([{"prompt": "a", "sample": 4, "value": "high", "correct": None, "parts": {}}])
    with pytest.raises(UserError, match=r"rewards\.jsonl, row 4: not a reward"):
        list(read_rewards(path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step", "3"], "--step names rollouts: add --rollouts"),
        (["--rollouts", "--diff", "--prompt", "a"], "leave out --rollouts"),
        (["--rollouts", "--step", "7"], "--step 7: the last rollouts are those of steps 5 – 6"),
    ],
)
def test_wrong_options_are_one_line(arguments, message, run, monkeypatch, capsys):
    error = shown(monkeypatch, capsys, run, *arguments, code=2)
    assert message in error and error.count("\n") == 1


def test_a_run_without_rollouts_says_so(tmp_path, monkeypatch, capsys):
    begin_run(tmp_path, catalog.load_recipe("tiny"))
    assert "no rollouts" in shown(monkeypatch, capsys, tmp_path, "--rollouts", code=2)
    (tmp_path / "phases" / "2-rl" / "rollouts").mkdir(parents=True)
    assert "phases/2-rl" in shown(monkeypatch, capsys, tmp_path, "--rollouts", code=2)


def test_a_training_that_has_not_sampled_yet_says_so(tmp_path, monkeypatch, capsys):
    begin_run(tmp_path, catalog.load_recipe("tiny", [GRPO]))
    assert "has not written anything yet" in shown(monkeypatch, capsys, tmp_path, "--rollouts", code=2)


# ---- planning


def test_the_rollouts_of_a_recipe_by_hand(tmp_path):
    """30 prompts in sets of 8 are 3 whole sets an epoch; 1.5 epochs are 5 sets of 8 · 4 rollouts, in 10 steps."""
    objective = "train.objective={kind: grpo, rollouts: {prompts_per_step: 8, samples: 4, updates: 2}}"
    recipe = catalog.load_recipe("tiny", [objective, "train.num_train_epochs=1.5"])
    traces = Traces(30, 1, Expected(value=600), "given")
    plan = estimate_rollouts(recipe, tmp_path, traces, None, 20.0)
    assert (plan.sets, plan.steps, plan.count, plan.mean) == (
        5,
        10,
        160,
        256,
    ) and "half of max_new_tokens" in plan.basis
    assert estimate_rollouts(recipe, tmp_path, traces, 9999, 20.0).mean == 512, "the token limit"
    data = estimate_rollouts(recipe, tmp_path, traces, 100, 20.0).data(1024)
    assert (data.rows, data.tokens, data.longest, data.steps) == (160, 160 * 120, 532, 10)
    recipe = catalog.load_recipe("tiny", [objective, "train.max_steps=3"])
    assert estimate_rollouts(recipe, tmp_path, traces, 100, 20.0).sets == 2, "the second is trained on once"
    assert estimate_rollouts(catalog.load_recipe("tiny"), tmp_path, traces, 100, 20.0) is None


def test_stored_rollouts_are_measured(run):
    recipe = catalog.load_recipe("tiny", [GRPO])
    plan = estimate_rollouts(recipe, run, Traces(30, 1, Expected(value=600), "given"), None, 20.0)
    assert plan.mean == 3 and plan.basis == "as the 9 stored"


def test_skipped_groups_are_those_of_the_log(run, tmp_path):
    """Half of the groups were skipped, so that half of the rollouts are trained on, and all are sampled."""
    recipe = catalog.load_recipe("tiny", [GRPO, "train.max_steps=4"])
    traces = Traces(30, 1, Expected(value=600), "given")
    plan = estimate_rollouts(recipe, run, traces, 10, 20.0)
    assert (plan.count, plan.skipped, plan.read) == (8, 0.5, 8 * 30)
    assert (plan.data(1024).rows, plan.data(1024).tokens) == (4, 4 * 30)
    assert "50% in groups without variance, as logged" in plan.described()
    unknown = estimate_rollouts(recipe, tmp_path / "new", traces, 10, 20.0)
    assert (unknown.skipped, unknown.data(1024).rows) == (None, 8) and "none is assumed" in unknown.described()


def test_the_answers_of_a_base_are_planned():
    """20 prompts, 3 answers each in one of two phases, as long as the teacher's traces: 60 · 50 tokens."""
    own = "{name: b, objective: {kind: sft}, data: [{kind: own, samples: 3}]}"
    recipe = catalog.load_recipe("tiny", [f"train.phases=[{{name: a, objective: {{kind: sft}}}}, {own}]"])
    machine = parse("1xH100")
    stage = answers_of(recipe, Traces(20, 1, Expected(value=1000), "given"), [machine])
    rate = decoding_rate(catalog.load_student("tiny-qwen").parameters, 0.0, machine)
    assert stage.tokens.value == 3000 and stage.hours.value == pytest.approx(3000 / rate / 3600)
    assert answers_of(catalog.load_recipe("tiny"), Traces(20, 1, Expected(value=1000), "given"), [machine]) is None


def test_likeliest_tokens_take_disk_until_two_checkpoints_later():
    """100 sets of 20 tokens in 200 steps; a checkpoint every 25 steps keeps 25 of the sets: 500 · 8 numbers of 4."""
    objective = "train.objective={kind: on_policy, top_k: 8, rollouts: {updates: 2}}"
    recipe = catalog.load_recipe("tiny", [objective, "train.save_steps=25"])
    plan = RolloutPlan(200, 100, 200, 10.0, 20, 5.0, "given")
    assert stored_bytes(recipe, plan) == 200 * 10 * 12 + 25 * 20 * 8 * 4


def test_traces_are_mixed_in_by_share(tmp_path):
    objective = "train.objective={kind: on_policy, student_share: 0.8, rollouts: {prompts_per_step: 10}}"
    recipe = catalog.load_recipe("tiny", [objective, "train.max_steps=4"])
    plan = estimate_rollouts(recipe, tmp_path, Traces(30, 1, Expected(value=600), "given"), 100, 20.0)
    assert plan.count == 40 and plan.traces == (10, 20.0)
    assert plan.data(1024).tokens == 40 * 120 + 10 * 40


def test_hours_of_rollouts_and_scoring_by_hand():
    """On H100 a student of 7.62 B decodes at 989e12 · 5 % / (2 · 7.62e9) tokens/s; the base scores at 40 %; 200,000
    answers take the graders 0.01 s each."""
    changes = ["train.objective={kind: grpo, kl_weight: 0.1}", "train.train_batch_size=null"]
    recipe = catalog.load_recipe("r1-distill-qwen-7b", changes)
    plan = RolloutPlan(100, 100, 200_000, 1000.0, 2000, 200.0, "given")
    rollouts, scoring = stages_of(recipe, [(recipe, plan)], None, [parse("1xH100")])
    size = catalog.load_student(recipe.student).parameters * 1e9
    assert rollouts.hours.value == pytest.approx(2e8 / (989e12 * 0.05 / (2 * size)) / 3600)
    workers = recipe.filter.correct.workers
    graders = 200_000 * 0.01 / workers / 3600
    assert scoring.hours.value == pytest.approx(2 * size * 2.4e8 / (989e12 * 0.4) / 3600 + graders)
    assert scoring.tokens is None and rollouts.disk.value == 2e8 * 12
    unknown = stages_of(recipe, [(recipe, plan)], None, [])
    assert [stage.hours for stage in unknown] == [None, None] and stages_of(recipe, [], None, []) == []


def test_engines_beside_the_trainer_by_hand():
    """bfloat16, 4 layers of 2 heads of 16: 4 · 2 · 2 · 16 · 2 = 512 bytes a token. 16 sequences of 1,000 tokens."""

    config = Qwen2Config(num_hidden_layers=4, num_key_value_heads=2, num_attention_heads=4, hidden_size=64)
    for objective, judges in (
        ({"kind": "on_policy"}, (5e9,)),
        ({"kind": "grpo", "kl_weight": 0.1, "rollouts": {"prompts_per_step": 2}}, (2e6,)),
        ({"kind": "grpo", "rollouts": {"prompts_per_step": 2}}, ()),
    ):
        beside = engines(config, training(objective), 1_000_000, 2, 1000, 1, (5e9,), None)
        assert (beside.weights, beside.context, beside.sequences, beside.judges) == (2e6, 512e3, 16 * 512e3, judges)
        rollouts, scoring = beside.within(10e9, "cpu")
        assert rollouts == 2e6 + 16 * 512e3 and scoring == sum(judges) + CPU_CACHE * len(judges)
    bounded = engines(config, training({"kind": "on_policy"}), 1_000_000, 2, 1000, 1, (5e9,), 1.0)
    assert bounded.within(10e9, "cuda")[1] == 1 << 30
    assert bounded.within(1e6, "cuda")[0] == 2e6 + 512e3, "the cache has room for one sequence at least"


def test_gradients_of_several_batches_of_rollouts_are_counted():
    for changes, ranks, several in (
        ({}, 1, True),  # 16 · 8 rollouts in batches of one
        ({"per_device_train_batch_size": 128}, 1, False),
        ({"per_device_train_batch_size": 64}, 2, False),
        ({"per_device_train_batch_size": 32}, 2, True),
        ({"per_device_train_batch_size": 32, "updates": 4}, 1, False),
    ):
        rollouts = {"prompts_per_step": 16, "samples": 8, "updates": changes.pop("updates", 1)}
        settings = Train.model_validate({"objective": {"kind": "grpo", "rollouts": rollouts}, **changes})
        assert memory.accumulates(settings, ranks) == several
    assert memory.accumulates(Train(gradient_accumulation_steps=2), 4) and not memory.accumulates(Train(), 4)


def test_the_largest_batch_is_of_rollouts_and_of_traces(monkeypatch, tmp_path):
    """With student_share below 1, whichever is longer."""
    from types import SimpleNamespace

    from distill.train.ranks import join
    from distill.train.rollouts import setup

    given = []
    monkeypatch.setattr(join, "prepared", lambda *_: object())
    monkeypatch.setattr(memory, "largest_batch", lambda *_: (16_000, 100))
    monkeypatch.setattr(memory, "check", lambda recipe, largest, *_: given.append(largest) or "one")
    monkeypatch.setattr(setup, "engines_beside", lambda *_: None)
    monkeypatch.setattr(join, "configuration", lambda *_: None)
    recipe = catalog.load_recipe("tiny", ["train.objective={kind: on_policy, student_share: 0.5}"])
    models = SimpleNamespace(base=SimpleNamespace(directory=tmp_path))
    questions = SimpleNamespace(largest_batch=lambda _: (700, 600))
    assert join.layout(recipe, models, None, questions) == "one" and given == [(16_000, 600)]


def test_a_training_that_does_not_fit_beside_its_teacher_is_refused(monkeypatch):
    from distill.plan.training import configuration

    recipe = catalog.load_recipe("tiny", ["train.objective={kind: on_policy}"])
    config = configuration(recipe, catalog.load_student("tiny-qwen"))
    monkeypatch.setattr(memory, "memory", lambda: (0, 8e9))
    assert memory.check(recipe, (64, 64), config, 1) == "one"
    beside = engines(config, recipe.train, 1_000_000, 4, 128, 1, (9e9,), None)
    with pytest.raises(UserError, match="GB of it for scoring.*engine.memory_budget or a server for the teacher"):
        memory.check(recipe, (64, 64), config, 1, beside)


@pytest.mark.slow
def test_a_recipe_of_rollouts_is_planned_without_its_teachers_traces(tmp_path, monkeypatch, capsys):
    from eval_support import distill

    monkeypatch.chdir(tmp_path)
    changes = ("--set", "train.objective={kind: on_policy}", "--set", "train.max_steps=5")
    assert distill(monkeypatch, "plan", "tiny", "--hardware", "1xH100", "--mean-tokens", 60, *changes) == 0
    out = capsys.readouterr().out
    assert "5 sets of rollouts, 80 rollouts of mean 60 tokens (as given)" in out
    assert [row.split()[0] for row in out.partition("All stages")[2].splitlines()[3:7]] == [
        "rollouts",
        "scoring",
        "train",
        "eval",
    ]
    assert "for the student's engine" in out and "--pilot" not in out
    assert distill(monkeypatch, "plan", "tiny", "--pilot", 2, *changes) == 2
    assert "set --mean-tokens instead" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_schedule_is_one_formula():
    rollouts = OnPolicy.model_validate({"kind": "on_policy", "rollouts": {"updates": 3, "samples": 2}}).rollouts
    assert [rollouts.set_at(step) for step in (1, 3, 4)] == [0, 0, 1] and rollouts.steps_of(1) == (4, 6)
    assert rollouts.set_of(5) == 2
    assert rollouts.total_steps(40, 1.0, None) == 6 and rollouts.total_steps(40, 1.0, 4) == 4
