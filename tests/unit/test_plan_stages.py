"""`distill plan` for generation: the pilot is stored and not paid for twice; tokens, money and what is said of them."""

import json
from collections import Counter
from pathlib import Path

import pytest
import yaml
from eval_support import distill, right, server, url

from distill import catalog, console, generate
from distill.artefacts import RunPaths
from distill.errors import UserError
from distill.fingerprint import digest
from distill.plan import stages
from distill.plan.judging import described, plan_judgements
from distill.plan.rollouts import RolloutPlan
from distill.plan.traces import Traces
from distill.planned import Expected, Measured, Pilot, Plan
from distill.prompts import Prompt, load_prompts
from distill.traces.ledger import Ledger
from distill.traces.store import TraceStore
from distill.traces.trace import Trace

PRICE = {"input": 1, "output": 10, "date": "2025-01-20", "source": "a test"}


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """`recipe(server)`: forty problems, two samples each, of a teacher behind that server."""
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def write(script):
        content = {
            "name": "served",
            "teacher": "deepseek-r1",
            "student": "tiny-qwen",
            "server": {"url": url(script), "model": "scripted", "price": PRICE},
            "prompts": [{"kind": "file", "path": "sums.jsonl"}],
            "generate": {"samples": 2, "sampling": {"max_new_tokens": 64}},
            "eval": {"benchmarks": ["tiny-arithmetic"]},
        }
        (tmp_path / "served.yaml").write_text(yaml.safe_dump(content))
        return "served.yaml"

    return write


@pytest.mark.slow
def test_generate_asks_exactly_the_rest_after_a_pilot(recipe, monkeypatch, capsys):
    with server(right) as script:
        name = recipe(script)
        assert distill(monkeypatch, "plan", name, "--pilot", 8) == 0
        assert len(script.asked) == 16
        pilot = {trace.key for trace in TraceStore(Path("runs/served/traces"))}
        assert set(Counter(prompt for prompt, _ in pilot).values()) == {2}
        questions = {asked["messages"][-1]["content"] for asked in script.asked}
        assert questions != {f"What is {n} + {n}?" for n in range(8)}, "the pilot is drawn at random"
        assert distill(monkeypatch, "plan", name, "--pilot", 8) == 0 and len(script.asked) == 16
        assert distill(monkeypatch, "plan", name) == 0 and len(script.asked) == 16
        assert "16 stored traces of 8 prompts" in capsys.readouterr().out
        assert distill(monkeypatch, "generate", name) == 0
        assert len(script.asked) == 80 == len({asked["seed"] for asked in script.asked})
    traces = list(TraceStore(Path("runs/served/traces")))
    assert len(traces) == 80 and len({trace.teacher for trace in traces}) == 1


def test_tokens_and_money_by_hand(recipe, monkeypatch, capsys):
    """Every answer has seven tokens, every prompt one: 560 and 80 tokens; 560 · 10 + 80 · 1 millionths of a dollar."""
    with server(right) as script:
        assert distill(monkeypatch, "plan", recipe(script), "--pilot", 8) == 0
    plan = Plan.read(RunPaths(Path("runs/served")).plan, "")
    generate = next(stage for stage in plan.stages if stage.stage == "generate")
    assert generate.tokens.value == 560 and plan.prompt_tokens == 80 and plan.mean_tokens == 7
    assert generate.tokens.low == pytest.approx(560) and generate.tokens.high == pytest.approx(560)
    assert generate.money.value == pytest.approx(0.00568) and plan.currency == "USD"
    assert plan.measured is not None and plan.measured.at_once == 16
    assert generate.hours.value == pytest.approx(560 / plan.measured.rate / 3600)
    assert "price of 2025-01-20" in capsys.readouterr().out


def test_traces_with_other_settings_are_refused(recipe, monkeypatch, capsys):
    with server(right) as script:
        name = recipe(script)
        assert distill(monkeypatch, "plan", name, "--pilot", 2) == 0
        for more in ((), ("--pilot", 4)):
            assert distill(monkeypatch, "plan", name, "--set", "generate.sampling.temperature=1", *more) == 2
            assert "sampling.temperature: 0.6 → 1" in capsys.readouterr().err
        assert len(script.asked) == 4


@pytest.mark.slow
def test_a_plan_without_a_pilot_writes_nothing_and_says_what_is_assumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert distill(monkeypatch, "plan", "tiny") == 0
    assert "the length (--mean-tokens) assumed; --pilot 8 measures it" in capsys.readouterr().out
    assert distill(monkeypatch, "plan", "tiny", "--mean-tokens", 58) == 0
    out = capsys.readouterr().out
    assert "3,000 traces, mean 58 tokens: as given" in out and "174 k" in out and "prompt tokens (counted)" in out
    for changes in (("prompts.0.limit=10",), ("generate.max_prompts=10",)):
        sets = [word for change in changes for word in ("--set", change)]
        assert distill(monkeypatch, "plan", "tiny", *sets) == 0 and "\n10 traces, " in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_a_pilot_of_published_traces_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert distill(monkeypatch, "plan", "s1-32b", "--pilot", 8) == 2
    assert "copies published traces" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


QUICK = ("tiny", "deepseek-api-qwen-7b")  # a plan takes seconds; the others are slow together


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in catalog.entries("recipe")],
)
def test_every_recipe_is_planned_without_network(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    recipe = catalog.load_recipe(name)
    plan = stages.plan_recipe(recipe, tmp_path / "nowhere", ["8xH200"])
    sampling = any(training.objective.rollout_settings for training in recipe.train.trainings)
    teaching, learning = ["generate", "filter"] * recipe.reads_traces, ["rollouts", "scoring"] * sampling
    learning += ["answers"] * any(training.own for training in recipe.train.trainings)
    assert [stage.stage for stage in plan.stages] == [*teaching, *learning, "train", "eval"]
    wide = capsys.readouterr().out.partition("All stages")[2].splitlines()[: 3 + len(plan.stages)]
    assert max(map(len, wide)) <= 80


@pytest.mark.parametrize("name", ["deepseek-api-qwen-7b", "r1-served-qwen-7b"])
def test_recipes_of_servers_are_checked_planned_and_run(name, recipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-a-key-of-many-characters")
    with server(right) as script:
        recipe(script)
        assert distill(monkeypatch, "recipes", "copy", name, "mine.yaml") == 0
        content = yaml.safe_load(Path("mine.yaml").read_text())
        here = {"url": url(script), "model": "scripted", "api_key_env": "DEEPSEEK_API_KEY"}
        content |= {"prompts": [{"kind": "file", "path": "sums.jsonl"}], "server": here}
        Path("mine.yaml").write_text(yaml.safe_dump(content))
        assert distill(monkeypatch, "recipes", "check", name) == 0
        assert distill(monkeypatch, "plan", "mine.yaml", "--pilot", 8) == 0
        out = capsys.readouterr().out
        assert "price of 2025-01-20, 0.55 USD per million prompt tokens, 2.19 per million completion tokens" in out
        assert distill(monkeypatch, "generate", "mine.yaml") == 0
        assert len(script.asked) == 80
        assert set(script.keys) == {"Bearer sk-a-key-of-many-characters"}


def test_the_rate_of_a_machine_by_hand():
    """R1: 8 · 989e12 · 5 % / (2 · 37e9) on H200; its 671 GB do not fit on eight H100 of 80 GB."""
    from distill.plan.hardware import parse

    assert stages.decoding_rate(37, 671, parse("8xH200")) == pytest.approx(5346, rel=1e-3)
    assert stages.decoding_rate(37, 671, parse("8xH100")) is None


def test_eval_by_hand(tmp_path, monkeypatch):
    """Two problems of 30 (--set eval.limit=2), 3 answers each of 100 tokens by every model: 600 tokens a model. On one
    H100 a student of 7.62 billion makes 989e12 · 5 % / (2 · 7.62e9) = 3,245 tokens/s. The teacher is behind an API."""
    monkeypatch.chdir(tmp_path)
    overrides = ["eval.limit=2", "eval.samples=3", "eval.benchmarks=[aime-2024]"]
    recipe = catalog.load_recipe("deepseek-api-qwen-7b", overrides)
    students = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"models": ("base", "student")})})
    *_, plan = stages.plan_recipe(students, tmp_path / "run", ["1xH100"], traces=10, mean=100).stages
    assert plan.tokens.value == 1200 and plan.money is None
    assert plan.hours.value * 3600 == pytest.approx(1200 / 3245, rel=0.01)
    everyone = recipe.model_copy(update={"eval": recipe.eval.model_copy(update={"models": ("student", "teacher")})})
    *_, plan = stages.plan_recipe(everyone, tmp_path / "run", traces=10, mean=100).stages
    price = catalog.price_of(recipe)
    assert plan.hours is None, "nothing is known of the student's rate"
    assert plan.money.value == pytest.approx((6 * stages.ASSUMED_PROMPT * price.input + 600 * price.output) / 1e6)


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (7, "7"),
        (999, "999"),
        (999.9, "1.00 k"),
        (173_999, "174 k"),
        (1.2345e9, "1.23 B"),
        (4.56e12, "4.56 T"),
    ],
)
def test_large_numbers_are_short(value, text):
    assert console.short(value) == text


def test_a_rate_measured_with_other_settings_is_not_used(recipe, monkeypatch):
    with server(right) as script:
        loaded = catalog.load_recipe(recipe(script))
        own = digest(generate.STAGE.recipe_settings(loaded))
    plan = Plan.model_construct(measured=Measured(rate=9.0, at_once=1, prompt_tokens=None, settings=own))
    assert stages._of_same_settings(loaded, plan) == plan.measured
    other = Plan.model_construct(measured=plan.measured.model_copy(update={"settings": "other"}))
    assert stages._of_same_settings(loaded, other) is None


def test_a_pilot_that_a_server_refuses_leaves_the_settings_free(recipe, monkeypatch):
    def refuse(*arguments):
        raise UserError("the server refuses it")

    monkeypatch.setattr(generate, "collect", refuse)
    with server(right) as script:
        assert distill(monkeypatch, "plan", recipe(script), "--pilot", 2) != 0
    assert not RunPaths(Path("runs/served")).record("generate").exists()


def interval_of_generate(monkeypatch, name):
    assert distill(monkeypatch, "plan", name) == 0
    plan = Plan.read(RunPaths(Path("runs/served")).plan, "")
    return plan, next(stage.tokens for stage in plan.stages if stage.stage == "generate")


def test_a_pilot_keeps_its_interval_while_generate_goes_on(recipe, monkeypatch, capsys):
    with server(right) as script:
        name = recipe(script)
        assert distill(monkeypatch, "plan", name, "--pilot", 8) == 0
        before, pilot = interval_of_generate(monkeypatch, name)
        assert pilot.low is not None and len(before.pilot.prompts) == 8 and before.pilot.samples == 2
        store, loaded = TraceStore(Path("runs/served/traces")), catalog.load_recipe(name)
        known = {trace.key[0] for trace in store}
        assert known == set(before.pilot.prompts)
        others = [p for p in load_prompts(loaded.prompts, None, None) if p.id not in known][:10]
        with store:  # the first to finish are short
            teacher = next(iter(store)).teacher
            store.append(
                [Trace(p, n, 0, "4", None, "4", "stop", teacher, completion_tokens=1) for p in others for n in (0, 1)]
            )
        capsys.readouterr()
        after, tokens = interval_of_generate(monkeypatch, name)
        assert tokens == pilot and after.pilot == before.pilot
        assert "16 stored traces of 8 prompts, the pilot's" in " ".join(capsys.readouterr().out.split())


def test_stored_traces_without_a_finished_pilot_have_no_interval(recipe, monkeypatch, capsys):
    with server(right) as script:
        name = recipe(script)
        assert distill(monkeypatch, "plan", name, "--pilot", 8) == 0
        RunPaths(Path("runs/served")).plan.unlink()
        _, tokens = interval_of_generate(monkeypatch, name)
        assert tokens.low is None and tokens.high is None
        assert "expect more" in " ".join(capsys.readouterr().out.split())
        assert distill(monkeypatch, "plan", name, "--pilot", 8) == 0 and len(script.asked) == 16
        assert interval_of_generate(monkeypatch, name)[1].low is not None


def test_pilots_of_the_same_prompts_are_joined():
    first, second = (Pilot(prompts=ids, samples=2, population="a") for ids in (("p", "q"), ("q", "r")))
    assert second.joined(first).prompts == ("p", "q", "r")
    assert second.joined(first.model_copy(update={"samples": 1})).samples == 1
    assert second.joined(first.model_copy(update={"population": "b"})) == second == second.joined(None)


def test_the_judgements_of_a_recipe_by_hand(tmp_path):
    """60 traces are judged once, by filter.judge: 60 · (1,000 · 1 + 200 · 10) millionths; then as the stored ones."""
    judge = {"server": {"url": "http://127.0.0.1:1/v1", "model": "j", "price": PRICE}}
    loaded = catalog.load_recipe("tiny", [f"judge={json.dumps(judge)}", "filter.judge=true"])
    paths, estimate = RunPaths(tmp_path), Traces(30, 2, Expected(value=600), "given")
    plan = plan_judgements(loaded, paths, None, estimate)
    assert (plan.filter, plan.eval, plan.stored) == (60, 0, 0) and plan.money == pytest.approx(60 * 3000 / 1e6)
    assert "assumed: 0.18 USD, beside the table" in described(plan)
    paths.judgements.mkdir()
    with Ledger(paths.judgements / "filter-judge.jsonl") as ledger:
        ledger.append([{"id": str(n), "prompt_tokens": 100 * n, "completion_tokens": 10} for n in (1, 3)])
    plan = plan_judgements(loaded, paths, None, estimate)
    assert (plan.stored, plan.prompt_tokens, plan.completion_tokens) == (2, 200, 10)
    assert plan.money == pytest.approx(60 * 300 / 1e6) and "as the 2 stored have" in described(plan)
    mixed = [Prompt.from_question(str(n), "a", "judge" if n < 3 else "math") for n in range(30)]
    assert plan_judgements(loaded, paths, mixed, estimate).filter == 60 + 6
    plans = [
        (catalog.load_recipe("tiny", [f"train.objective={{kind: {kind}}}"]), RolloutPlan(1, 1, 200, 9.0, 12, 5.0, ""))
        for kind in ("grpo", "on_policy")
    ]
    plan = plan_judgements(loaded, paths, mixed, estimate, plans)
    assert plan.train == 20 and "(66 of filter, 20 of train, 0 of eval)" in described(plan), "a tenth of one training's"
    assert plan_judgements(catalog.load_recipe("tiny"), paths, None, estimate) is None
