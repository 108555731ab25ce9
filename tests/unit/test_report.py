"""The report of a made-up run directory: what the page shows, what it survives, and that it needs nothing else."""

import base64
import hashlib
import html
import random
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_support import make_run, make_trace, record_again

from distill import report
from distill.artefacts import (
    FilterSummary,
    InstructionScores,
    Interval,
    PartScore,
    PublishedScores,
    RunPaths,
    Scores,
)
from distill.config import parse, read_yaml
from distill.errors import UserError
from distill.evaluations import EvaluationPaths, EvaluationRecord, published_line
from distill.integrity import record_files
from distill.prompts import Prompt
from distill.recipe import Recipe
from distill.record import StageRecord
from distill.report import contents as contents_module
from distill.report import pictures, write_report
from distill.report.mathematics import TAG, marked_up
from distill.report.pictures import LIGHT
from distill.traces.store import write_traces
from distill.traces.trace import Trace, Verdict

QUESTION = Prompt.from_question("Why?", None)


class Page(HTMLParser):
    """Text, ids, and everything that could make a browser ask for something; tags must close as they opened."""

    VOID = frozenset({"meta", "link", "br", "path", "use", "input"})
    OPTIONAL = frozenset({"li", "tr", "th", "td", "p", "thead", "tbody"})  # whose end tags HTML lets us leave out

    def __init__(self, text):
        super().__init__()
        self.ids, self.requests, self.words, self.open, self.tags = [], [], [], [], []
        self.feed(text)
        assert not self.open, self.open
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "xlink:href", "action", "data") and not value.startswith(("#", "data:,")):
                self.requests.append(value)
            assert not name.startswith("on"), f"a script in {name}"
        if tag not in self.VOID | self.OPTIONAL:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID | self.OPTIONAL:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self.VOID | self.OPTIONAL:
            assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def reader():
    return (Path(report.__file__).parent / "reader.js").read_text(encoding="utf-8")


def contents_of(directory):
    recipe = RunPaths(directory).recipe
    return contents_module.read_contents(directory, parse(Recipe, read_yaml(recipe), str(recipe)))


def page_of(directory):
    return Page(write_report(directory).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = make_run(tmp_path_factory.mktemp("report") / "tiny")
    write_report(directory)
    return directory


def test_the_whole_story_is_told(finished):
    page = Page((finished / "report.html").read_text(encoding="utf-8"))
    for said in ("tiny-r1 teaches tiny-qwen", "The filters kept 53 of 60", "think block not closed: 3", "wrong: 4"):
        assert said in page.text
    for said in ("1 min 34 s", "52 traces in 360 optimiser steps", "One problem, 3 answers", "learning_rate: 1.0e-05"):
        assert said in page.text
    for row in contents_of(finished).scores:
        assert f"{100 * row.pass_at_1.value:.1f} %" in page.text
        assert f"{100 * row.pass_at_1.low:.1f} – {100 * row.pass_at_1.high:.1f} %" in page.text


def test_the_page_stands_alone(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.requests == []
    assert page.tags.count("script") == 1 and f"<script>{reader()}</script>" in text
    digest = base64.b64encode(hashlib.sha256(reader().encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in text, "the browser runs this script and no other"
    assert "@import" not in text
    assert re.findall(r"url\((?!#)", text) == []
    assert len(page.ids) == len(set(page.ids)), "one id twice: a clip path would clip another picture"
    assert len(text) < 500_000


def test_every_reference_inside_the_page_is_there(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    wanted = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    assert wanted <= set(Page(text).ids)


def test_both_themes_know_every_colour(finished):
    text = (finished / "report.html").read_text(encoding="utf-8")
    light, _, dark = text.partition("@media (prefers-color-scheme: dark)")
    for name in LIGHT:
        assert f"--{name}: #" in light
        assert f"--{name}: #" in dark.partition("</style>")[0]
    drawings = "".join(re.findall(r"<svg.*?</svg>", text, re.DOTALL))
    assert re.findall(r"(?:fill|stroke): ?#[0-9a-f]{6}", drawings) == [], "a colour that does not follow the theme"


def test_published_scores_stand_beside_ours(finished):
    ours = contents_of(finished).scores
    published = [
        PublishedScores(benchmark="tiny-arithmetic", model="Somebody", scores={"pass@1": 0.433, "cons@64": 0.6}),
        PublishedScores(benchmark="tiny-arithmetic", model="Only votes", scores={"cons@64": 0.6}),
        PublishedScores(benchmark="another", model="Nobody", scores={"pass@1": 0.1}),
    ]
    drawn = pictures.scores(ours, published)
    assert "Somebody on tiny-arithmetic 43.3%, as published" in drawn.caption
    assert "Nobody" not in drawn.caption and "Only votes" not in drawn.caption
    assert "Somebody, published" in drawn.svg["wide"] and "43.3 %" in drawn.svg["narrow"]
    assert published_line(published[1], ours[0]) == "published for Only votes: cons@64 60.0%"
    assert "outside the interval of base, cons@64 60.0%" in published_line(published[0], ours[0])


def test_a_published_score_of_more_problems_is_not_compared(finished):
    (ours, *_) = contents_of(finished).scores
    card = {"benchmark": ours.benchmark, "model": "Somebody", "problems": ours.problems}
    published = PublishedScores(scores={"pass@1": 0.4}, **card)
    assert "outside the interval" in published_line(published, ours)
    more = published.model_copy(update={"problems": 1319})
    line = f"published for Somebody: pass@1 40.0%, for all 1,319 problems, of which {ours.problems} were asked here"
    assert published_line(more, ours) == line


def test_pass_rates_are_of_each_problem(tmp_path):
    """By hand: of four samples a prompt, one is solved twice and one never; one sample a prompt tells no rates."""
    run = make_run(tmp_path / "run", "filter", traces=20)
    assert contents_of(run).solved == [] and "solved every time" not in page_of(run).text
    rng, traces, verdicts = random.Random(0), [], {}
    for question, right in (("a", (1, 0, 1, 0)), ("b", (0, 0, 0, 0)), ("c", (1, 1, 1, 1))):
        for sample, one in enumerate(right):
            trace = replace(make_trace(rng, "train", sample=sample), prompt=Prompt.from_question(question, "1"))
            traces.append(trace)
            verdicts[trace.key] = [Verdict("correct", bool(one), "ok" if one else "wrong", {})]
    for name, good in (("kept", True), ("dropped", False)):
        write_traces(run / "filtered" / name, [t for t in traces if verdicts[t.key][0].keep is good], verdicts)
    record_again(run, "filter")
    contents = contents_of(run)
    assert sorted(contents.solved) == [(0, 4), (2, 4), (4, 4)]
    assert pictures._bins([contents.solved]) == 4
    assert pictures._shares(contents.solved, 4) == pytest.approx([1 / 3, 0, 1 / 3, 0, 1 / 3])
    assert pictures._bins([[(3, 64)]]) == pictures._bins([[(1, 4), (1, 5)]]) == 10
    drawn = pictures.solved("prompts", {"teacher": {"teacher": contents.solved}})
    assert "of 3 problems teacher solved 1 every time, 1 never" in drawn.caption
    assert "How often each prompt was solved" in page_of(run).text


@pytest.mark.slow
def test_time_and_its_price(finished):
    plain, priced = (Page(write_report(finished, price).read_text(encoding="utf-8")).text for price in (None, 3.6))
    assert "all 6 min 16 s" in plain and "price_per_hour" in plain
    assert "1 min 34 s 0.09" in priced and "all 6 min 16 s 0.38" in priced and "at 3.60 per hour" in priced
    write_report(finished)


@pytest.mark.parametrize("name", ["scores", "funnel", "lengths", "loss"])
def test_pictures_are_files_too(finished, name):
    assert (finished / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert ElementTree.parse(finished / "report" / f"{name}.svg").getroot().tag.endswith("svg")


def test_the_same_run_gives_the_same_page(finished):
    first = (finished / "report.html").read_bytes()
    assert write_report(finished).read_bytes() == first


@pytest.mark.one_in(3)
@pytest.mark.parametrize(
    ("upto", "missing"),
    [
        (
            "generate",
            ["not been filtered yet", "training has not finished", "Nothing has been scored", "no judged traces"],
        ),
        ("filter", ["training has not finished", "Nothing has been scored"]),
        ("train", ["Nothing has been scored"]),
        ("eval", []),
    ],
)
def test_a_run_that_is_not_finished_says_so(tmp_path, upto, missing):
    page = page_of(make_run(tmp_path / "run", upto, traces=20, problems=10))
    assert [said for said in missing if said in page.text] == missing
    assert page.text.count("RUN/recipe.yaml --run-dir RUN , where RUN is the run directory, to continue.") == len(
        missing
    )


def test_a_recipe_alone_is_a_report(tmp_path):
    run = make_run(tmp_path / "run", "generate")
    (run / "stages" / "generate.json").unlink()
    assert "has not answered all prompts yet" in page_of(run).text


def test_what_a_model_wrote_is_text(tmp_path):
    """Markup, half a character, a NUL and dollar signs in traces, names and reasons reach the page as text."""
    run = make_run(tmp_path / "run", traces=20, problems=10)
    nasty = "</div></details><script>alert('$x$ & y')</script>\x00\ud83d"
    trace = make_trace(random.Random(1), "train")
    trace = Trace(Prompt.from_question(nasty, nasty), 0, 0, nasty, nasty, nasty, "stop", "f", (1,), (1, 2))
    write_traces(
        run / "filtered" / "dropped", [trace], {trace.key: [Verdict("format", False, nasty[:-1], {"a": nasty})]}
    )
    record_again(run, "filter")
    path = RunPaths(run).record("filter")
    record = StageRecord.read(path, "")
    summary = FilterSummary.model_validate(record.summary, strict=False)
    step = summary.funnel[0].model_copy(update={"reasons": {"<b>$bold$</b>": 3}})
    nasty_summary = summary.model_copy(update={"funnel": (step, *summary.funnel[1:])})
    record.model_copy(update={"summary": nasty_summary.to_json()}).write(path)
    for directory in run.glob("eval/*/*"):
        paths = EvaluationPaths(directory)
        Scores.read(paths.scores, "").model_copy(update={"benchmark": "<i>$\\frac$</i>"}).write(paths.scores)
        files = record_files(directory, paths.products())
        EvaluationRecord.read(paths.record, "").model_copy(update={"files": files}).write(paths.record)
    record_again(run, "eval")
    page = page_of(run)
    assert not {"b", "i"} & set(page.tags) and page.tags.count("script") == 1
    assert "<script>alert('" in page.text and "& y')</script>" in page.text
    assert "<b>$bold$</b>" in page.text


def test_long_texts_are_cut_and_it_is_said(tmp_path):
    run = make_run(tmp_path / "run", "filter", traces=20)
    text = "start " + "x" * 100_000 + " end"
    trace = Trace(Prompt.from_question("q", "1"), 0, 0, text, text, "1", "stop", "f", (1,), (1, 2))
    write_traces(run / "filtered" / "kept", [trace])
    record_again(run, "filter")
    page = page_of(run)
    assert "80,010 characters left out" in page.text
    assert "start x" in page.text
    assert "x end" in page.text


def test_lengths_that_were_not_counted_are_words(tmp_path):
    """Published traces have no token ids: nothing says `0 tokens`, and the histogram is of words."""
    run = make_run(tmp_path / "run", "filter", traces=20)
    assert contents_of(run).lengths.unit == "tokens"
    path = RunPaths(run).record("generate")
    record = StageRecord.read(path, "")
    record.model_copy(update={"summary": {**(record.summary or {}), "completion_tokens": 0}}).write(path)
    uncounted = replace(make_trace(random.Random(1), "train"), text="four words and more", completion_token_ids=())
    uncounted = replace(uncounted, completion_tokens=None)
    write_traces(run / "filtered" / "kept", [uncounted])
    record_again(run, "filter")
    contents, page = contents_of(run), page_of(run)
    assert contents.lengths.unit == "words" and contents.lengths.kept == [4] and all(contents.lengths.dropped)
    assert "whose tokens were not counted" in page.text and "4 words, tokens not counted" in page.text
    assert "words per completion" in (run / "report/lengths.svg").read_text() and " 0 tokens" not in page.text


def test_the_answers_shown_are_of_a_problem_that_was_learnt(finished):
    by_model = {answer.model: answer for answer in contents_of(finished).answers}
    assert list(by_model) == ["base", "student", "teacher"]
    assert (by_model["base"].good, by_model["student"].good) == (False, True)
    assert len({answer.question for answer in by_model.values()}) == 1


def test_prompts_without_a_gold_answer_have_no_pass_rate(tmp_path):
    run = make_run(tmp_path / "run", "filter", traces=20)
    traces = [replace(make_trace(random.Random(0), "train", sample=i), prompt=QUESTION) for i in range(2)]
    said = {trace.key: [Verdict("correct", False, "unverifiable: no gold answer", {})] for trace in traces}
    write_traces(run / "filtered" / "dropped", traces, said)
    record_again(run, "filter")
    assert contents_of(run).solved == []
    said[traces[0].key] = [Verdict("correct", False, "unverifiable: no answer found", {})]
    write_traces(run / "filtered" / "dropped", traces * 2, said)
    record_again(run, "filter")
    assert contents_of(run).solved[-1] == (0, 2)


def test_a_sum_of_some_counts_is_said_to_be_one(tmp_path):
    run = make_run(tmp_path / "run", "generate", traces=20)
    path = RunPaths(run).record("generate")
    record = StageRecord.read(path, "")
    for counted, tokens, said in (
        (18, None, "1,800 tokens in total of the 18 traces that have a count"),
        (20, 1800, ""),
    ):
        summary = {**(record.summary or {}), "completion_tokens": 1800, "counted": counted}
        record.model_copy(update={"summary": summary}).write(path)
        assert contents_of(run).stages[0].tokens == tokens
        assert (said or "1,800 tokens in total.") in page_of(run).text


def test_an_empty_answer_has_a_length(tmp_path):
    """Its 0 tokens are a count; 0 beside a text is none."""
    run = make_run(tmp_path / "run", "filter", traces=20)
    empty = Trace(QUESTION, 0, 0, "", None, "", "stop", "f" * 16, (1,), completion_tokens=0)
    write_traces(run / "filtered" / "dropped", [empty])
    record_again(run, "filter")
    assert (contents_of(run).lengths.unit, contents_of(run).lengths.dropped) == ("tokens", [0])
    write_traces(run / "filtered" / "dropped", [replace(empty, text="a b", response="a b")])
    record_again(run, "filter")
    assert contents_of(run).lengths.unit == "words"


def test_a_value_stands_where_there_is_room(finished):
    """Right of a short interval, left of a high one, right of the axes where the interval takes the whole width."""

    def place(low, high):
        interval = Interval(value=low, low=low, high=high)
        row = contents_of(finished).scores[0].model_copy(update={"pass_at_1": interval})
        axes = pictures.scores([row])._figure("narrow").axes[0]
        (text,) = axes.texts
        inside = text.get_transform() == axes.transData
        return text.get_ha() if inside else "outside"

    assert [place(0, 0.5), place(0.5, 1), place(0, 0.79), place(0.2, 1)] == ["left", "right", "outside", "outside"]


def test_a_path_is_no_title(finished):
    contents = contents_of(finished)
    recipe = contents.recipe.model_copy(update={"teacher": f"/{'deep/' * 30}model"})
    drawn = report._pictures(replace(contents, recipe=recipe, solved=[(1, 2)]))["prompts"]
    assert "model on the prompts: of 1 problems" in drawn.caption and "deep" not in drawn.caption


@pytest.mark.parametrize("price", [float("nan"), float("inf"), -1.0])
def test_a_price_is_a_number(finished, price):
    with pytest.raises(UserError, match=f"--price-per-hour {price:g}: give a finite number"):
        write_report(finished, price)


def test_another_version_is_refused_by_the_name_of_the_argument(tmp_path):
    run = make_run(tmp_path / "run", "generate")
    (run / "run.json").write_text('{"format": 1}')
    with pytest.raises(UserError, match="choose another RUN"):
        write_report(run)


def test_another_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"recipe\.yaml"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_state_is_named(tmp_path):
    run = make_run(tmp_path / "run", "generate")
    (run / "stages" / "generate.json").write_text("{")
    with pytest.raises(UserError, match=r"stages/generate\.json is damaged"):
        write_report(run)


@pytest.mark.parametrize(
    ("text", "formulas"),
    [
        ("It costs $2 per egg and $3 per hen, US$5 and $6.50 in all", 0),
        ("so $x^2 + 1 = 5$, $n$ and $17$", 3),
        (r"\[ \frac{1}{2} \] and \(\sqrt{3}\), $$y = 2$$", 3),
        (r"the answer is \boxed{\frac{3}{4}}.", 1),
        (r"\boxed{cut off", 0),
        (r"\begin{aligned} not fenced \end{aligned}", 0),
    ],
)
def test_formulas_are_found_and_money_is_none(text, formulas):
    made = str(marked_up(text))
    assert made.count("<math ") == made.count("</math>") == formulas
    if not formulas:
        assert html.unescape(made) == text


@given(st.text(st.sampled_from("$\\()[]{}<>&\"'=^_ abx1\n/") | st.characters(codec="utf-8"), max_size=60))
def test_no_text_becomes_markup(text):
    """Whatever is written, and however it is fenced: nothing but MathML without links, styles and classes comes out."""
    for fenced in (text, f"${text}$", f"\\({text}\\)", f"$\\text{{{text}}}$", f"$\\href{{{text}}}{{x}}$"):
        tags = re.findall(r"<[^>]*>?", str(marked_up(fenced)))
        assert all(TAG.fullmatch(tag) for tag in tags), tags
        assert not any(re.search("href|style|class| on", tag) for tag in tags)


def test_a_large_run_gives_a_small_page(tmp_path, monkeypatch):
    """Sampled to a budget, and it says so; the lengths are of all."""
    run = make_run(tmp_path / "run", "filter", traces=20)
    rng = random.Random(3)
    long = [
        replace(make_trace(rng, "train", sample=i), reasoning="x " * 20_000, text="x " * 20_000) for i in range(300)
    ]
    write_traces(run / "filtered" / "kept", long)
    record_again(run, "filter")
    contents = contents_of(run)
    assert len(contents.lengths.kept) == 300 and 5 < len([t for t in contents.traces if t.good]) < 60
    path = write_report(run)
    assert path.stat().st_size < 3_000_000 and " of 3" in Page(path.read_text(encoding="utf-8")).text


def test_instructions_sources_and_judges_are_shown(tmp_path, monkeypatch):
    half = Interval(value=0.5, low=0.4, high=0.6)
    more = {
        "instructions": InstructionScores(
            prompt_strict=half,
            prompt_loose=Interval(value=0.625, low=0.5, high=0.7),
            instruction_strict=half,
            instruction_loose=Interval(value=0.75, low=0.7, high=0.8),
        ),
        "parts": {"feb_2025": PartScore(problems=30, pass_at_1=Interval(value=0.125, low=0.1, high=0.2))},
        "settings": {"judge.model.model": "grader-7b"},
    }
    results = contents_module._results
    monkeypatch.setattr(
        contents_module,
        "_results",
        lambda directory: [replace(each, scores=each.scores.model_copy(update=more)) for each in results(directory)],
    )
    text = page_of(make_run(tmp_path / "run")).text
    for shown in ("Instructions followed", "62.5 % (50.0 – 70.0)", "75.0 %", "feb_2025", "12.5 %"):
        assert shown in text
    assert "tiny-arithmetic is graded by a judge, grader-7b" in text
