"""Every kind of walls, for root and for a caller without rights: what each must hold."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from distill.grading.sandbox.levels import level_of
from distill.grading.sandbox.runner import NotAvailable, Sandbox, Zygote

TESTS = Path(__file__).resolve().parent.parent
LEVEL = {"namespaces": "full", "bubblewrap": "full", "landlock": "landlock", "process": "process"}


@pytest.fixture(scope="module", params=LEVEL)
def sandbox(request: pytest.FixtureRequest) -> Iterator[Sandbox]:
    kind = request.param
    try:
        zygote = Zygote(kind)
    except NotAvailable as error:
        pytest.skip(f"no {kind} on this machine: {error}")
    with zygote:
        if level_of(zygote.powers) != LEVEL[kind]:
            pytest.skip(f"{kind} gives less on this machine: {zygote.powers}")
        yield Sandbox(zygote)


FILES = {  # not held at level `process`
    "the tests": f"import os\nprint(os.listdir({str(TESTS)!r}))",
    "the source": f"print(open({str(TESTS / 'conftest.py')!r}).read())",
    "another package": f"print(open({pytest.__file__!r}).read())",
    "the memory of the caller": f"print(len(open('/proc/{os.getpid()}/mem', 'rb').read(1)))",
    "the environment of the caller": f"print(open('/proc/{os.getpid()}/environ').read())",
    "a file in the temporary directory": "import os\nprint(open('/tmp/../tmp/x', 'w'), os.listdir('/var/tmp'))",
}
HELD = {
    "a socket": "import socket\nsocket.socket()",
    "a process": "import subprocess\nsubprocess.run(['/bin/true'])",
    "a daemon": "import os\nif os.fork() == 0:\n os.setsid()\n os.fork()",
    "the shadow file": "open('/etc/shadow').read()",
    "writing outside": "import os\nopen(os.path.join(os.path.dirname(os.__file__), 'x'), 'w')",
    "killing the parent": "import os\nos.kill(os.getppid(), 9)",
    "killing everything": "import os\nos.kill(-1, 9)",
    "tracing the parent": (
        "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.ptrace(16, os.getppid(), 0, 0) < 0: raise PermissionError(ctypes.get_errno())"
    ),
    "a mount": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) < 0: raise PermissionError(ctypes.get_errno())"
    ),
    "a namespace": (
        "import ctypes\nlibc = ctypes.CDLL(None, use_errno=True)\n"
        "if libc.unshare(0x10000000) < 0: raise PermissionError(ctypes.get_errno())"
    ),
    "100 GB": "bytearray(100 << 30)",
    "a large file": "f = open('a', 'wb')\nwhile True: f.write(bytes(1 << 20))",
    "a descriptor of another process": "import os\nfor n in range(3, 1024): os.write(n, b'x')",
    "a link to the shadow file": "import os\nos.symlink('/etc/shadow', 'x')\nopen('x').read()",
    "a device": "import os, stat\nos.mknod('sda', stat.S_IFBLK | 0o600, os.makedev(8, 0))",
}


def unaffected(sandbox: Sandbox) -> bool:
    after = sandbox.script("import os\nprint(int(input()) + 1, os.listdir())", b"41\n", 5.0)
    return (after.reason, after.output) == ("", b"42 []\n")


@pytest.mark.parametrize("name", HELD)
def test_every_kind_of_walls_holds(sandbox: Sandbox, name: str) -> None:
    ended = sandbox.script(HELD[name], b"", 1.0)
    assert ended.reason.startswith(("error: ", "memory limit", "file limit")) and not ended.output, ended
    assert unaffected(sandbox)


@pytest.mark.parametrize("name", FILES)
def test_files_are_held_above_the_level_process(sandbox: Sandbox, name: str) -> None:
    if sandbox.zygote.powers["walls"] == "process":
        pytest.skip("the level `process` does not hold files")
    ended = sandbox.script(FILES[name], b"", 1.0)
    assert ended.reason in ("error: PermissionError", "error: FileNotFoundError") and not ended.output, ended


def test_a_program_is_not_root_and_has_numpy(sandbox: Sandbox) -> None:
    shown = sandbox.script("import os\nimport numpy\nprint(os.getuid() != 0, numpy.arange(3).sum())", b"", 5.0)
    assert (shown.reason, shown.output) == ("", b"True 3\n")
    assert sandbox.script("import pytest", b"", 5.0).reason == "error: ModuleNotFoundError"


@pytest.mark.skipif(os.geteuid() != 0, reason="the caller is not root, so these tests are the ones above")
def test_a_caller_without_rights_is_held_as_well() -> None:
    command = [
        sys.executable,
        str(TESTS / "unprivileged.py"),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-n",
        "0",
        "-q",
    ]
    done = subprocess.run([*command, __file__], capture_output=True, text=True, timeout=300, cwd=TESTS.parent)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


WITHOUT_NAMESPACES = """
from pathlib import Path
from distill.errors import UserError
from distill.grading.sandbox import kernel, levels
user, group = __import__("os").getuid(), __import__("os").getgid()
kernel.unshare(kernel.NEWUSER)
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/uid_map").write_text(f"{inside} {user} 1")
Path("/proc/self/gid_map").write_text(f"{inside} {group} 1")
Path("/proc/sys/user/max_user_namespaces").write_text("0")
print(levels.this_machine()[0])
print(dict(levels.describe())["for more"])
try:
    levels.require_level("full", "eval.sandbox")
except UserError as error:
    print(error)
"""


def test_a_machine_that_forbids_namespaces_says_so() -> None:
    code = WITHOUT_NAMESPACES.replace("{inside}", "0")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespaces to forbid: {done.stderr.splitlines()[-1]}")
    level, more, refusal = done.stdout.splitlines()
    assert level in ("landlock", "process") and "sysctl user.max_user_namespaces" in more
    assert refusal.startswith("eval.sandbox: ") and f"eval.sandbox: {level}" in refusal


def test_bubblewrap_that_does_not_work_is_passed_over(tmp_path: Path) -> None:
    stand_in = tmp_path / "bwrap"
    stand_in.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    stand_in.chmod(0o755)
    code = "from distill.grading.sandbox.runner import Zygote\nZygote('bubblewrap')"
    environment = {**os.environ, "PATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment)
    assert done.stderr.splitlines()[-1].endswith("NotAvailable: bwrap: No permissions to create new namespace")
