"""The documentation against the code: generated pages, examples, commands, recipes, messages, links.

Python blocks run one after another, a page at a time, in a directory that holds a finished run (`runs/tiny`). Lines of
shell blocks that begin with `distill` are parsed by the command line. YAML blocks are validated as the recipe or card
that they are part of. Messages that troubleshooting.md quotes occur in the code, with `…` for what is filled in.
"""

import ast
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from distill import Run, limits
from distill.artefacts import RunPaths
from distill.cli import app
from distill.config import RENAMED, parse, read_yaml
from distill.pipeline import STAGES
from distill.recipe import BenchmarkCard, Recipe, TeacherCard

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tools"))
import write_reference  # noqa: E402

DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [*DOCS, ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)?(?:#([\w-]+))?\)")
MINIMAL = {"name": "x", "teacher": "tiny-r1", "student": "tiny-qwen", "eval": {"benchmarks": ["tiny-arithmetic"]}}
PROMPTS = [{"kind": "procedural", "name": "arithmetic"}]


def blocks(language):
    """(page, block) of every fenced block in a language, the page's name first for the test's id."""
    found = []
    for page in PAGES:
        for number, (name, text) in enumerate(FENCE.findall(page.read_text(encoding="utf-8")), 1):
            if name == language:
                found.append(pytest.param(text, id=f"{page.stem}-{number}"))
    return found


# ---- generated pages


@pytest.mark.parametrize("name", write_reference.PAGES)
def test_generated_pages_are_those_of_the_code(name):
    assert (ROOT / "docs" / name).read_text(encoding="utf-8") == write_reference.PAGES[name](), (
        "run python tools/write_reference.py"
    )


def test_the_reference_says_what_may_change():
    rows = {row.key: row for row in write_reference.rows(Recipe) if isinstance(row, write_reference.Row)}
    assert rows["generate.samples"] == write_reference.Row(
        "generate.samples", "integer, ≥ 1", "`1`", rows["generate.samples"].description, True
    )
    assert not rows["generate.sampling.temperature"].free and rows["generate.sampling.temperature"].default == "`0.6`"
    assert rows["eval.benchmarks"].default == "**required**"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("description", "another"),
        ("price_per_hour", 2.5),
        ("seed", 1),
        ("generate.samples", 3),
        ("generate.sampling.top_p", 0.5),
        ("filter.dedup", False),
        ("filter.correct.workers", 1),
        ("train.max_steps", 5),
        ("train.save_steps", 7),
        ("eval.models", ["student"]),
        ("eval.seed", 5),
    ],
)
def test_what_may_change_is_what_a_finished_run_accepts(key, value, tiny_run):
    rows = {row.key: row for row in write_reference.rows(Recipe) if isinstance(row, write_reference.Row)}
    recipe = Run(tiny_run).recipe
    changed = parse(Recipe, recipe.model_dump(mode="json"), "x", [f"{key}={json.dumps(value)}"])
    assert changed != recipe
    same = all(stage.recipe_settings(recipe) == stage.recipe_settings(changed) for stage in STAGES.values())
    assert rows[key].free is same


def test_every_key_of_a_recipe_is_in_the_reference():
    page = (ROOT / "docs" / "recipe-reference.md").read_text(encoding="utf-8")
    resolved = parse(Recipe, MINIMAL | {"prompts": PROMPTS}, "x").model_dump(mode="json")

    def keys(value, prefix=""):
        for key, inner in value.items():
            yield f"{prefix}{key}"
            if isinstance(inner, dict) and f"| `{prefix}{key}` |" not in page:
                yield from keys(inner, f"{prefix}{key}.")

    plain = [key for key in keys(resolved) if f"| `{key}` |" not in page and f"## `{key}`" not in page]
    assert [key for key in plain if not any(other.startswith(f"{key}.") for other in keys(resolved))] == []


# ---- examples


@pytest.fixture(scope="module")
def workplace(tiny_run, tmp_path_factory):
    """A directory with `runs/tiny`."""
    place = tmp_path_factory.mktemp("examples")
    (place / "runs").mkdir()
    (place / "runs" / "tiny").symlink_to(tiny_run)
    return place


@pytest.mark.parametrize(
    "page", [page for page in PAGES if "```python" in page.read_text()], ids=lambda page: page.stem
)
def test_python_examples_run(page, workplace, monkeypatch):
    monkeypatch.chdir(workplace)
    namespace = {}
    for language, text in FENCE.findall(page.read_text(encoding="utf-8")):
        if language == "python":
            exec(compile(text, f"{page.name}: {text.splitlines()[0]}", "exec"), namespace)


def command_lines():
    """Every command of a shell block, or between backticks in a sentence."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        shell = [line for name, block in FENCE.findall(text) if name == "bash" for line in block.splitlines()]
        inline = re.findall(r"`(distill [a-z][^`]*)`", re.sub(FENCE, "", text))
        for line in dict.fromkeys([*shell, *inline]):
            if line.startswith("distill "):
                found.append(pytest.param(line.partition(" > ")[0], id=f"{page.stem}: {line}"))
    return found


@pytest.mark.parametrize("line", command_lines())
def test_documented_commands_are_parsed_by_the_command_line(line):
    words = shlex.split(line)[1:]
    words = [
        re.sub(r"^[A-Z|]+$", "train", word) if last == "--fresh" else word
        for last, word in zip(["", *words], words, strict=False)
    ]
    command, context = typer.main.get_command(app), None
    while True:
        context = command.make_context(
            words[0] if words else "distill", list(words), parent=context, resilient_parsing=not words
        )
        if not hasattr(command, "commands"):
            return
        _, command, words = command.resolve_command(context, [*context._protected_args, *context.args])
        if not words and hasattr(command, "commands"):
            return  # the group alone, named in a sentence


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml_examples_are_valid(text, tmp_path):
    file = tmp_path / "example.yaml"
    file.write_text(text, encoding="utf-8")
    content = read_yaml(file)
    if "family" in content:
        parse(TeacherCard, content, "example")
    elif content.keys() - Recipe.model_fields.keys():
        parse(BenchmarkCard, content, "example")
    else:
        source = {} if {"prompts", "traces"} & content.keys() else {"prompts": PROMPTS}
        parse(Recipe, MINIMAL | source | content, "example")


@pytest.mark.parametrize("text", blocks("json"))
def test_json_examples_are_rows(text):
    for line in text.splitlines():
        assert isinstance(json.loads(line), dict)


# ---- messages, files, links


def messages():
    """Every text in the code, with `…` for what is filled in."""
    for path in (ROOT / "distill").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value
            elif isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)


def test_quoted_messages_exist():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = [line[3:].partition("` | ")[0] for line in page.splitlines() if line.startswith("| `")]
    assert len(quoted) > 30
    known = list(messages())
    assert [text for text in quoted if not any(text in message for message in known)] == []


def test_the_limits_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").partition("## Limits")[2]
    mib, gib = 1 << 20, 1 << 30
    assert f"the text of a Parquet row | {limits.ROW_BYTES // mib} MiB |" in page
    assert f"nesting of JSON | {limits.JSON_DEPTH} levels |" in page
    values = f"{limits.YAML_NODES:,} values (aliases expanded), {limits.YAML_DEPTH} levels"
    assert f"| {limits.YAML_BYTES // mib} MiB, {values} |" in page
    assert f"the source of a chat template | {limits.TEMPLATE_BYTES // mib} MiB |" in page
    rendering = f"{limits.TEMPLATE_SECONDS} seconds of processor time, {limits.TEMPLATE_MEMORY // gib} GiB of memory"
    assert f"{rendering}, {limits.RENDERED_CHARACTERS:,} characters" in page


def test_the_changelog_lists_every_renamed_key():
    page = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w.]+)` \| `(.*)` \|$", page, re.MULTILINE))
    assert rows == RENAMED


def test_every_file_of_a_run_is_described():
    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    paths = RunPaths(Path("RUN"))
    places = [getattr(paths, name) for name, value in vars(RunPaths).items() if isinstance(value, property)]
    names = [place.relative_to("RUN").as_posix() for place in places]
    assert len(names) > 10
    assert [name for name in names if f"| `{name}`" not in page and f"| `{name}/" not in page] == []


def test_every_column_of_a_trace_is_described(tiny_run):
    import pyarrow.parquet as pq

    page = (ROOT / "docs" / "runs.md").read_text(encoding="utf-8")
    names = set(pq.read_schema(tiny_run / "filtered" / "kept" / "part-00000.parquet").names)
    assert {name for name in names if f"`{name}`" not in page} <= {"exact", "completion_tokens"}


def anchors(page):
    """The anchors of a page's headings, as the site makes them."""
    for title in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
        explicit = re.search(r"\{ #([\w-]+) \}$", title)
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"\s*\{ #.*", "", title)).strip().lower()
        yield explicit[1] if explicit else re.sub(r"[-\s]+", "-", plain)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target, anchor in LINK.findall(re.sub(FENCE, "", page.read_text(encoding="utf-8"))):
        if "://" in target:
            continue
        place = page.parent / target if target else page
        assert place.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in set(anchors(place)), f"{page.name}: {target}#{anchor}"


def test_the_site_is_built_strictly(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > len(DOCS)
    asked = [
        tag for page in pages for tag in re.findall(r'<(?:script|link|img)[^>]*"(?:https?:)?//[^>]*>', page.read_text())
    ]
    assert asked == [], "the site must work without other hosts"
