"""YAML and overrides in; a validated model, or one line, out."""

import math
import re
from typing import Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import JsonValue

from distill.config import RENAMED, dump_yaml, parse, read_yaml
from distill.errors import UserError
from distill.filters.format import Format
from distill.recipe import BenchmarkCard, Judge, Recipe
from distill.section import Section

MINIMAL = {
    "name": "x",
    "teacher": "t",
    "student": "s",
    "prompts": [{"kind": "procedural", "name": "arithmetic"}],
    "eval": {"benchmarks": ["b"]},
}


def recipe(*overrides, **changes):
    return parse(Recipe, MINIMAL | changes, "my.yaml", overrides)


def error_of(*overrides, **changes):
    with pytest.raises(UserError) as caught:
        recipe(*overrides, **changes)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- reading


def test_numbers_without_a_point_are_numbers(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 1e-5\nb: 2E3\nc: -1.5e+2\nd: 1e\ne: '1e-5'\nf: 12\ng: 1.5")
    assert read_yaml(file) == {"a": 1e-5, "b": 2000.0, "c": -150.0, "d": "1e", "e": "1e-5", "f": 12, "g": 1.5}
    assert isinstance(read_yaml(file)["f"], int)


@pytest.mark.parametrize(
    ("text", "where", "what"),
    [
        ("a: [1, 2\nb: 3\n", ":2:", "not valid YAML"),
        ("a: 1\n\tb: 2\n", ":2:1", "cannot start any token"),
        ("a: 1\nb:\n  c: 1\n  c: 2\n", ":4:3", "duplicate key 'c'"),
        ("a: *nowhere\n", ":1:4", "undefined alias"),
        ("a: \x00\n", "a.yaml: ", "not valid YAML"),
        ("a: !!timestamp foo\n", ":1:4", "the tag !!timestamp is not supported"),
        ("a: !!python/object:os.system x\n", ":1:4", "python/object:os.system is not supported"),
        ("a: !!set {b}\n", ":1:4", "the tag !!set is not supported"),
        ("a: !!int foo\n", ":1:4", "'foo' is not of type int"),
        ("a: !!bool foo\n", ":1:4", "'foo' is not of type bool"),
        ("a: " + "9" * 5000, ":1:4", "a number of 5,000 characters; at most 400 are read"),
        ("a: " + "1:" * 5000 + "1", ":1:4", "at most 400 are read"),
        ("a: 0x" + "f" * 5000, ":1:4", "at most 400 are read"),
        ("a: " + "9" * 5000 + ".5", ":1:4", "at most 400 are read"),
        ("a: " + "[" * 60 + "]" * 60, ":1:53", "values are nested more than 50 deep"),
        ("a: " + "[" * 200_000, ":1:53", "values are nested more than 50 deep"),
        ("a: " + "{b: " * 3000, ":1:", "values are nested more than 50 deep"),
        ("".join(f"{' ' * i}a:\n" for i in range(600)), ":50:50", "values are nested more than 50 deep"),
        ("1: a\n", ":1:1", "the key 1 is not text; put it in quotes"),
        ("on: a\n", ":1:1", "the key on is not text"),
        ("2024-01-01: a\n1e5: b", ":2:1", "the key 1e5 is not text"),
        ("? [a]\n: b\n", ":1:3", "the key sequence is not text"),
        ("a: 1\n---\nb: 2\n", ":2:1", "but found another document"),
        ("a: b: c\n", ":1:5", "mapping values are not allowed here"),
    ],
)
def test_yaml_errors_name_file_and_line(tmp_path, text, where, what):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(what)) as caught:
        read_yaml(file)
    assert f"{file}{where}" in str(caught.value) or where in str(caught.value)
    assert "\n" not in str(caught.value)


def test_dates_are_text(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: 2024-01-01\nb: 2024-13-45\nc: 2001-12-14t21:59:43.10-05:00\n2024-01-01: d")
    assert read_yaml(file) == {
        "a": "2024-01-01",
        "b": "2024-13-45",
        "c": "2001-12-14t21:59:43.10-05:00",
        "2024-01-01": "d",
    }


ALIASES = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i}\n  <<: [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize("text", [ALIASES, MERGES, "- x\n" * 100_001], ids=["aliases", "merges", "long"])
def test_the_number_of_values_is_bounded(tmp_path, text):
    """Ten to the tenth values behind ten lines would be built, and then written as JSON."""
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=r"a\.yaml:\d+:\d+: not valid YAML: more than 100,000 values, aliases written"):
        read_yaml(file)


def test_aliases_and_merges_work(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}\n")
    assert read_yaml(file) == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 2}, "c": {"x": 1, "y": 3}}


def test_the_size_of_a_file_is_bounded(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("a: '" + " " * (4 << 20) + "'")
    with pytest.raises(UserError, match=r"a file of 4,194,309 bytes; YAML files of at most 4,194,304 are read"):
        read_yaml(file)


def test_a_byte_order_mark_is_passed_over(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    assert read_yaml(file) == {"a": 1, "b": 2}


def test_a_binary_file_is_not_yaml(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_bytes(b"name: \xff\xfe")
    with pytest.raises(UserError, match="not a UTF-8 text file"):
        read_yaml(file)


@pytest.mark.parametrize(("data", "found"), [(None, "is empty"), ([1], "holds a list"), ("x", "holds a str")])
def test_what_is_not_a_mapping_is_refused(data, found):
    with pytest.raises(UserError, match=f"my.yaml: {found}; it should be a mapping"):
        parse(Recipe, data, "my.yaml")


def test_an_alias_inside_itself_is_refused(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("name: &a [*a]\n")
    with pytest.raises(UserError, match=r"a\.yaml:1:\d+: not valid YAML: an alias \(\*name\) contains itself"):
        read_yaml(file)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(json_values)
def test_what_is_dumped_reads_back_as_it_was(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / "round.yaml"
    file.write_text(dump_yaml(value), encoding="utf-8", newline="")
    assert read_yaml(file) == value


@pytest.mark.parametrize("text", ["1e5", "12e45", "null", "on", "1:30", "0x10", "2024-01-01", "~", "", " a ", "a: b"])
def test_strings_that_look_like_something_else_are_quoted(tmp_path, text):
    file = tmp_path / "a.yaml"
    file.write_text(dump_yaml({"revision": text}))
    assert read_yaml(file) == {"revision": text}


# ---- overrides


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("train.learning_rate=2e-5", lambda r: r.train.learning_rate, 2e-5),
        ("train.num_train_epochs=3", lambda r: r.train.num_train_epochs, 3.0),
        ("prompts.0.limit=10", lambda r: r.prompts[0].limit, 10),
        ("prompts.0={kind: file, path: a.jsonl}", lambda r: r.prompts[0].path, "a.jsonl"),
        ("generate.sampling.temperature=0", lambda r: r.generate.sampling.temperature, 0),
        ("generate.prompt_suffix=", lambda r: r.generate.prompt_suffix, ""),
        ("generate.prompt_suffix=a=b", lambda r: r.generate.prompt_suffix, "a=b"),
        ("filter.length.max_tokens=9", lambda r: r.filter.length.max_tokens, 9),
        ("filter={dedup: false}", lambda r: (r.filter.dedup, r.filter.format), (None, Format())),
        ("eval.benchmarks=[a, b]", lambda r: r.eval.benchmarks, ("a", "b")),
        ("eval.benchmarks.0=c", lambda r: r.eval.benchmarks, ("c",)),
        ("eval.sources.gsm8k=a.jsonl", lambda r: r.eval.sources, {"gsm8k": "a.jsonl"}),
        ('name="007"', lambda r: r.name, "007"),
    ],
)
def test_an_override_reaches_its_key(override, read, value):
    assert read(recipe(override)) == value


def test_overrides_apply_in_order_and_leave_the_data_alone():
    before = repr(MINIMAL)
    assert recipe("prompts.0.limit=1", "prompts.0.limit=2").prompts[0].limit == 2
    assert repr(MINIMAL) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rate", "write it as KEY=VALUE"),
        ("=1", "write it as KEY=VALUE"),
        ("a..b=1", "write it as KEY=VALUE"),
        ("train.lr=1", "--set train.lr: unknown key; did you mean train.learning_rate?"),
        ("learning_rate=1", "did you mean train.learning_rate?"),
        ("trian.learning_rate=1", "--set trian: unknown key; did you mean train?"),
        ("train.wd=1", "did you mean train.weight_decay?"),
        ("train.qqqq=1", "unknown key; valid here: objective, adapter, learning_rate"),
        ("seed.x=1", "unknown key: there are no keys below seed"),
        ("eval.sources.gsm8k.x=a", "unknown key: there are no keys below eval.sources.gsm8k"),
        ("prompts.1.limit=1", "'1' should be an index from 0 to 0 of that list"),
        ("prompts.limit=1", "'limit' should be an index"),
        ("prompts.0.limt=1", "did you mean prompts.0.limit?"),
        ("train.learning_rate=fast", '--set train.learning_rate: should be a valid number, not "fast"'),
        ("train.learning_rate=.inf", "finite number"),
        ("train.learning_rate=[", "the value is not valid YAML"),
        ("train=null", "--set train: should be a mapping of keys, not null"),
        ("train={learning_rate: x}", "--set train: train.learning_rate: should be a valid number"),
        ("generate.samples=0", "--set generate.samples: should be greater than or equal to 1, not 0"),
        ("generate.sampling.top_k=2147483648", "--set generate.sampling.top_k: should be less than 2147483648, not"),
        ("generate.samples=yes", "should be a valid integer, not true"),
        ('generate.samples="4"', "should be a valid integer"),
        ("train.data=[]", "--set train.data: needs at least 1 item"),
        ("seed=" + "9" * 5000, "--set seed: the value is not valid YAML (a number of 5,000 characters; at most 400"),
        ("seed=2024-13-45", '--set seed: should be a valid integer, not "2024-13-45"'),
        ("seed=!!timestamp foo", "--set seed: the value is not valid YAML (the tag !!timestamp is not supported"),
        ("seed=" + "[" * 9999, "--set seed: the value is not valid YAML (values are nested more than 50 deep)"),
        ("seed=[&a [1], " + "*a, " * 100_000 + "]", "more than 100,000 values, aliases written out"),
        ("seed='" + "x" * (4 << 20) + "'", "--set seed: the value is not valid YAML (4,194,306 characters of YAML; at"),
        ("prompts." + "9" * 5000 + "=1", "should be an index from 0 to 0 of that list"),
        ("prompts.²=1", "unknown key"),
    ],
)
def test_a_bad_override_says_what_is_wrong(override, message):
    assert message in error_of(override)


keys = st.text(st.characters(blacklist_characters=".=", blacklist_categories=["Cs", "Z", "C"]), min_size=1, max_size=8)


@given(st.lists(keys, min_size=1, max_size=4), st.text(max_size=20))
def test_any_override_is_applied_or_refused_in_one_line(path, value):
    override = f"{'.'.join(path)}={value}"
    try:
        assert isinstance(recipe(override), Recipe)
    except UserError as error:
        assert len(str(error).splitlines()) == 1
        assert "--set" in str(error) or "my.yaml" in str(error)


@given(st.text(max_size=40))
def test_any_text_is_taken_as_an_override_or_refused(text):
    try:
        recipe(text)
    except UserError as error:
        assert len(str(error).splitlines()) == 1


@given(st.floats(min_value=1e-12, max_value=1e3))
def test_any_number_survives_being_an_override(rate):
    assert recipe(f"train.learning_rate={rate!r}").train.learning_rate == rate


@given(st.text(max_size=30).filter(lambda text: text.isprintable()))
def test_any_quoted_text_survives_being_an_override(suffix):
    quoted = yaml.safe_dump(suffix, default_style='"', allow_unicode=True, width=math.inf).strip()
    assert recipe(f"generate.prompt_suffix={quoted}").generate.prompt_suffix == suffix


# ---- errors


def test_all_problems_are_reported_on_one_line_with_their_keys():
    message = error_of(train={"learnin_rate": 1, "max_length": "long"}, seed=1.5)
    assert message == (
        "my.yaml: seed: should be a valid integer, not 1.5; "
        'train.max_length: should be a valid integer, not "long"; '
        "train.learnin_rate: unknown key; did you mean train.learning_rate?"
    )


def test_errors_inside_a_union_name_the_keys_the_user_wrote():
    message = error_of(prompts=[{"kind": "hub", "datset": "a/b"}])
    assert "prompts.0.dataset: is missing" in message
    assert "prompts.0.datset: unknown key; did you mean prompts.0.dataset?" in message
    assert "hub." not in message


def test_suggestions_in_a_union_come_from_the_branch_that_was_chosen():
    assert "valid here: kind, path, split, weight, question" in error_of(
        prompts=[{"kind": "file", "path": "x", "subset": "y"}]
    )


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([{"name": "arithmetic"}], "prompts.0: the key 'kind' is missing"),
        (
            [{"kind": "web"}],
            "prompts.0: 'kind' should be one of 'procedural', 'reasoning_gym', 'file', 'hub', not 'web'",
        ),
        ({"kind": "hub"}, "prompts: should be a valid list"),
        ([1], "prompts.0: "),
    ],
)
def test_a_prompt_source_that_is_none(prompts, message):
    text = error_of(prompts=prompts)
    assert message in text
    assert "needs at least" not in text


def test_missing_keys_are_named():
    with pytest.raises(UserError, match=r"my\.yaml: teacher: is missing, and has no default; student: is missing"):
        parse(Recipe, {k: v for k, v in MINIMAL.items() if k not in ("teacher", "student")}, "my.yaml")


def test_the_file_and_the_override_are_blamed_apart():
    message = error_of("seed=x", train={"dtype": "magic"})
    assert "my.yaml: train.dtype: should be 'float32', 'bfloat16' or 'float8', not \"magic\"" in message
    assert '--set seed: should be a valid integer, not "x"' in message


def test_a_long_value_is_cut():
    assert len(error_of(train={"dtype": "m" * 10_000})) < 200


def test_cards_are_reported_alike():
    with pytest.raises(UserError, match=r"b.yaml: prompts.limt: unknown key; did you mean prompts.limit\?"):
        data = {"name": "b", "prompts": {"kind": "procedural", "name": "arithmetic", "limt": 3}}
        parse(BenchmarkCard, data, "b.yaml")


def test_many_problems_are_counted():
    message = error_of(train={f"key{i:04}": 1 for i in range(1000)})
    assert message.endswith("; and 990 more problems") and len(message) < 10_000


def test_a_key_is_shown_printable_and_cut():
    message = error_of(**{"\x1b[31m" + "k" * 10_000: 1})
    assert "\x1b" not in message and len(message) < 1000


# ---- keys of earlier versions


class Objective(Section):
    kind: Literal["sft", "logits"] = "sft"


class Renamed(Section):
    objective: Objective = Objective()
    sources: tuple[Objective, ...] = ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"divergence": "kl"}, "a.yaml: divergence: unknown key; write objective: {kind: logits, divergence: …}"),
        ({"objective": "logits"}, "a.yaml: objective: write objective: {kind: logits}"),
        ({"objective": {"kind": "x"}}, "a.yaml: objective.kind: should be 'sft' or 'logits', not \"x\""),
        ({"sources": [{}, {"weigth": 1}]}, "a.yaml: sources.1.weigth: unknown key; write weight"),
    ],
)
def test_an_old_key_is_answered_with_the_new_one(monkeypatch, data, message):
    monkeypatch.setitem(RENAMED, "divergence", "objective: {kind: logits, divergence: …}")
    monkeypatch.setitem(RENAMED, "objective", "objective: {kind: logits}")
    monkeypatch.setitem(RENAMED, "sources.weigth", "weight")
    with pytest.raises(UserError) as caught:
        parse(Renamed, data, "a.yaml")
    assert str(caught.value) == message


def test_an_old_key_of_an_override_is_answered_too(monkeypatch):
    monkeypatch.setitem(RENAMED, "train.rate", "train.learning_rate")
    assert error_of("train.rate=1") == "--set train.rate: unknown key; write train.learning_rate"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("min_score=x", '--set judge.min_score: should be a valid number, not "x"'),
        ("min_scor=3", "--set judge.min_scor: unknown key; did you mean judge.min_score?"),
        (
            "accepted=[yes]",
            "--set judge.accepted: judge.accepted.0: should be a valid string, not true; YAML reads yes",
        ),
        ("rejected=[no]", "YAML reads no and off as false: quote the word"),
        ("accepted=[3]", 'not 3; quote it: "3"'),
        ('prompt="', "--set judge.prompt: the value is not valid YAML"),
    ],
)
def test_a_section_by_itself_is_named_as_the_user_wrote_it(override, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse(Judge, {"teacher": "tiny-r1"}, "--set judge", [override], "judge")


def test_a_number_that_is_not_finite_is_named_in_any_json_value() -> None:
    class Any(Section):
        extra: dict[str, JsonValue]

    with pytest.raises(UserError, match=r"r.yaml: extra\.x: should be a finite number"):
        parse(Any, {"extra": {"x": float("nan")}}, "r.yaml")
