"""What reaches a terminal: tables that fit, characters that can be printed, progress that says something."""

import fcntl
import os
import pty
import subprocess
import sys
import termios
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from distill import console
from distill.console import ASCII, CONTROL, escaped, paged, progress, say, table
from distill.errors import UserError

COLUMNS = ("model", "pass@1 (95 %)", "truncated", "no\nanswer", "unverifiable", "mean\ntokens")
ROWS = [
    ("SmolLM2-135M-Instruct", "12.3% (10.1–14.5)", "10.0%", "55.0%", "56.1%", "1,234"),
    ("Qwen2.5-Coder-1.5B-Instruct", "100.0% (98.7–100.0)", "0.0%", "0.0%", "0.0%", "61"),
]


def printed(monkeypatch, capsys, width, *arguments, **options):
    """The lines of a table on a terminal of `width` columns."""
    terminal = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    monkeypatch.setattr(console, "console", lambda: terminal)
    table(*arguments, **options)
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("width", [40, 60, 80, 200])
def test_score_tables_fit_and_break_no_word(monkeypatch, capsys, width):
    lines = printed(monkeypatch, capsys, width, "Scores", COLUMNS, ROWS)
    assert max(map(len, lines)) <= width
    words = " ".join(lines).split()
    for cell in [cell for row in ROWS for cell in row] + list(COLUMNS[1:]):
        assert all(word in words or f"{word}:" in words for word in cell.split()), cell


def test_the_name_takes_a_line_of_its_own_where_the_table_is_too_wide(monkeypatch, capsys):
    wide, narrow = (printed(monkeypatch, capsys, width, "", COLUMNS, ROWS) for width in (100, 80))
    assert wide[3].startswith("SmolLM2-135M-Instruct  ") and wide[3].endswith("1,234")
    assert narrow[3] == "SmolLM2-135M-Instruct" and narrow[4].split()[0] == "12.3%"
    assert narrow[4].endswith("1,234") and len(narrow[4]) == len(narrow[6]), "figures are in line"


def test_every_value_has_a_line_where_it_is_narrower_still(monkeypatch, capsys):
    lines = printed(monkeypatch, capsys, 40, "", COLUMNS, ROWS)
    assert lines[:3] == ["SmolLM2-135M-Instruct", "  pass@1 (95 %): 12.3% (10.1–14.5)", "  truncated: 10.0%"]


def test_descriptions_are_wrapped_beside_their_names(monkeypatch, capsys):
    rows = [("a-recipe", "one two three four five six seven eight nine ten")]
    lines = printed(monkeypatch, capsys, 40, "", ("recipe", "what it is"), rows, text_columns=2)
    assert lines[2].startswith("a-recipe  one two") and lines[3].startswith("          ")
    assert max(map(len, lines)) <= 40


def test_a_pipe_gets_whole_lines(capsys):
    console.console.cache_clear()
    table("", ("recipe", "what it is"), [("name", "word " * 60)], text_columns=2)
    assert max(map(len, capsys.readouterr().out.splitlines())) > 200
    console.console.cache_clear()


def test_control_characters_are_written_out(capsys):
    console.console.cache_clear()
    assert escaped("a\x1b[31mred\x07\r\u202e\tb\n") == "a\\x1b[31mred\\x07\\r\\u202e\tb\n"
    say("[bold]\x1b]0;title\x07[/bold]")
    assert capsys.readouterr().out == "[bold]\\x1b]0;title\\x07[/bold]\n"
    table("", ("a", "b"), [("\x1b[2J", "\x9b1m")])
    assert "\\x1b[2J" in (out := capsys.readouterr().out) and "\x1b" not in out and "\x9b" not in out
    console.console.cache_clear()


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text):
    assert not CONTROL.search(escaped(text)) and escaped(escaped(text)) == escaped(text)


@pytest.mark.one_in(4)
@pytest.mark.parametrize("setting", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}])
@pytest.mark.parametrize("command", [["benchmarks", "list"], ["recipes", "show", "tiny"], ["recipes", "show", "…–"]])
def test_every_command_prints_without_utf8(setting, command):
    environment = {name: value for name, value in os.environ.items() if name not in ("LC_ALL", "LANG", "PYTHONUTF8")}
    result = subprocess.run(
        [sys.executable, "-X", "utf8=0", "-m", "distill.command", *command],
        env=environment | setting,
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in result.stderr, result.stderr
    assert (result.stdout + result.stderr).isascii() and (result.stdout or result.stderr)


def test_characters_have_an_ascii_neighbour():
    console.prepare()
    assert all(value.isascii() for value in ASCII.values())
    assert "1–2 × 3…é".encode("ascii", "ascii_instead") == b"1-2 x 3...?"


@pytest.fixture
def clock(monkeypatch):
    """A clock that is set by hand."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    console.console.cache_clear()
    yield now
    console.console.cache_clear()


def test_slow_work_shows_seconds_a_unit_and_the_last_note(clock, capsys):
    with progress("train", 10, "step", done=4) as advance:
        clock[0] = 24.0
        advance(2, "loss 1.23")
    assert capsys.readouterr().out.splitlines()[0] == "train: 6/10 step, 12.0 s/step, loss 1.23, 24 s, 48 s left"


def test_fast_work_shows_units_a_second(clock, capsys):
    with progress("copy", None, "traces") as advance:
        clock[0] = 2.0
        advance(30)
    assert capsys.readouterr().out == "copy: 30 traces, 15.0 traces/s, 2 s\n"


def test_nothing_done_has_no_rate(clock, capsys):
    with progress("copy", 5, "traces", done=5):
        pass
    assert capsys.readouterr().out == "copy: 5/5 traces, 0 s\n"


def test_an_interruption_says_what_is_kept(capsys, monkeypatch):
    monkeypatch.setattr(console, "_kept", "")
    with pytest.raises(KeyboardInterrupt), progress("train", 9, "step") as advance:
        advance(1)
        raise KeyboardInterrupt
    assert console.kept() == "", "a step is not on the disk when it is counted"
    with pytest.raises(KeyboardInterrupt), progress("generate", 9, "traces", done=2, stored=True) as advance:
        advance(1)
        raise KeyboardInterrupt
    assert console.kept() == "generate: 3/9 traces are kept"


# ---- the pager


PAGED = """
from distill import interrupts
interrupts.install()
from distill.console import paged
paged(["some text "])
print("distill goes on", flush=True)
"""


def test_an_interrupt_is_the_pagers(tmp_path):
    """On a terminal of its own, Ctrl-C reaches both: the pager stays, and so does distill until the pager is quit."""
    pager = tmp_path / "pager"
    pager.write_text("#!/bin/sh\ntrap 'echo still here' INT\ncat\necho shown\nread key </dev/tty\nread key </dev/tty\n")
    pager.chmod(0o755)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", PAGED],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PAGER": str(pager)},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    os.close(theirs)
    said = b""

    def read_until(text):
        nonlocal said
        while text not in said:
            said += os.read(ours, 1000)

    read_until(b"some text shown")
    os.write(ours, b"\x03")
    read_until(b"still here")
    assert process.poll() is None
    os.write(ours, b"q\nq\n")
    read_until(b"distill goes on")
    assert process.wait() == 0 and b"error" not in said
    os.close(ours)


def test_an_error_is_not_printed_below_an_empty_pager(tmp_path, monkeypatch):
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat >{tmp_path}/shown\n")
    pager.chmod(0o755)
    monkeypatch.setenv("PAGER", str(pager))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)

    def texts(*parts: str) -> Iterator[str]:
        yield from parts
        raise UserError("no such directory")

    with pytest.raises(UserError):
        paged(texts())
    assert not (tmp_path / "shown").exists()
    with pytest.raises(UserError):
        paged(texts("first, ", "second"))
    assert (tmp_path / "shown").read_text() == "first, second"
