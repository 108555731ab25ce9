"""Style and types, as `make lint` checks them: a test, so that it runs beside the others."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_style_and_types():
    command = ["make", "--old-file=.venv/installed-dev", "lint"]  # what is installed is what runs this test
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
