"""The walls around all programs of one zygote: what of the machine is visible inside, and how it gets that way.

Two ways lead to the same inside: namespaces that the zygote makes itself, or bubblewrap around it. Visible are the
interpreter's standard library, the shared libraries of the system, the packages that programs may import (`PACKAGES`),
four devices and the time zones, all read-only; and an empty /tmp. No /proc, no home directory, no network, and no
process of the machine.

Bubblewrap is used for callers other than root where it works, because some systems let it make namespaces and nobody
else. For root the zygote makes its own: inside bubblewrap a root caller's programs would keep the user id 0.
"""

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

from distill.grading.sandbox import kernel

SCRATCH = 64 << 20  # bytes that a program may write in all, and in one file
NOBODY = 65534  # the user and the group of programs
INSIDE = "/packages"  # where packages are mounted
PACKAGES = ("numpy",)  # beside the standard library: tests of EvalPlus need it, and answers use it
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache")
HIDDEN = (
    "/mnt",
    "/media",
    "/srv",
    "/tmp",
    "/home",
    "/var",
)  # the new root covers one of them
READ_ONLY = kernel.ATTR_RDONLY | kernel.ATTR_NOSUID | kernel.ATTR_NODEV
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")


def visible() -> list[str]:
    """The paths that are visible inside, as they are outside: interpreter and libraries."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}  # not a virtual environment, with its packages
    interpreter = {sysconfig.get_path("stdlib", vars=base), sysconfig.get_path("platstdlib", vars=base)}
    paths = [path for path in (*sorted(interpreter), *LIBRARIES) if os.path.exists(path)]
    return [path for path in paths if not any(path != other and path.startswith(other + "/") for other in paths)]


def packages() -> list[str]:
    """The directories of the packages that programs may import, those of their bundled libraries among them."""
    found = []
    for name in PACKAGES:
        spec = find_spec(name)
        for place in (spec and spec.submodule_search_locations) or ():
            found += [path for path in (place, f"{place}.libs") if os.path.isdir(path)]
    return found


def bubblewrap() -> str | None:
    """The path of bubblewrap; None where it is not installed."""
    return shutil.which("bwrap")


def command(own: Path) -> list[str]:
    """The interpreter and what bubblewrap puts around it. own: the directory of this package."""
    executable = os.path.realpath(sys.executable)
    library = Path(str(sysconfig.get_config_var("LIBDIR")), str(sysconfig.get_config_var("INSTSONAME")))
    parts = ["--unshare-user", "--unshare-ipc", "--unshare-pid", "--unshare-net", "--unshare-uts", "--new-session"]
    parts += ["--unshare-cgroup-try", "--die-with-parent", "--uid", str(NOBODY), "--gid", str(NOBODY)]
    parts += ["--cap-add", "CAP_SYS_ADMIN"]
    for path in [*visible(), executable, *([str(library)] if library.is_file() else [])]:
        parts += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in packages():
        parts += ["--ro-bind", path, f"{INSIDE}/{Path(path).name}"]
    parts += ["--ro-bind", str(own), f"{INSIDE}/{'/'.join(own.parts[-3:])}"]
    for path in DEVICES:
        parts += ["--dev-bind", path, path]
    return [*parts, "--size", str(SCRATCH), "--tmpfs", "/tmp", "--remount-ro", "/", "--chdir", "/tmp", "--", executable]


def build() -> None:
    """Enter namespaces of this process's own and their minimal root. The caller is process 1 afterwards.

    Errors: OSError where the kernel or the machine's policy does not allow it.
    """
    paths, extra = visible(), packages()
    sources = paths + extra
    root = os.geteuid() == 0
    _enter_user_namespace(root)
    if child := os.fork():  # the namespace of process ids begins with a child
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    kernel.die_with_parent(9)
    kernel.mount(None, "/", None, kernel.MS_REC | kernel.MS_PRIVATE)
    base = next(path for path in HIDDEN if os.path.isdir(path) and not any(p.startswith(path + "/") for p in sources))
    kernel.mount("tmpfs", base, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, "size=1m,mode=755")
    for path in paths:
        if os.path.islink(path):
            Path(base + path).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(os.readlink(path), base + path)
        else:
            _show(path, base + path)
    for path in extra:
        _show(path, f"{base}{INSIDE}/{Path(path).name}")
    for path in DEVICES:
        _show(path, base + path, kernel.ATTR_NOSUID)
    os.mkdir(f"{base}/tmp")
    kernel.enter_root(base)
    kernel.protect_mount("/", READ_ONLY, recursive=False)


def _show(source: str, target: str, attributes: int = READ_ONLY) -> None:
    if os.path.isdir(source):
        Path(target).mkdir(parents=True, exist_ok=True)
    else:
        Path(target).parent.mkdir(parents=True, exist_ok=True)
        Path(target).touch()
    kernel.mount(source, target, None, kernel.MS_BIND | kernel.MS_REC)
    kernel.protect_mount(target, attributes)


def _enter_user_namespace(root: bool) -> None:
    """New namespaces, in which a root caller is root and may become nobody, and any other caller is nobody."""
    flags = kernel.NEWUSER | kernel.NEWNS | kernel.NEWPID | kernel.NEWNET | kernel.NEWIPC | kernel.NEWUTS
    if not root:
        user, group = os.geteuid(), os.getegid()
        kernel.unshare(flags)
        _write("self", {"setgroups": "deny", "uid_map": f"{NOBODY} {user} 1", "gid_map": f"{NOBODY} {group} 1"})
        return
    entered, mapped = os.pipe(), os.pipe()
    owner = os.getpid()
    if (helper := os.fork()) == 0:  # only a process outside may map two ids
        os.close(entered[1])
        if os.read(entered[0], 1):
            table = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
            with suppress(OSError):
                _write(str(owner), {"uid_map": table, "gid_map": table})
                os.write(mapped[1], b"x")
        os._exit(0)
    os.close(mapped[1])
    try:
        kernel.unshare(flags)
        os.write(entered[1], b"x")
    finally:  # without a word from here the helper ends
        os.close(entered[1])
        done = os.read(mapped[0], 1)
        os.waitpid(helper, 0)
        os.close(entered[0])
        os.close(mapped[0])
    if not done:
        raise OSError(1, f"uid_map: user {NOBODY} cannot be mapped")


def _write(process: str, files: dict[str, str]) -> None:
    for name, text in files.items():
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


def readable_paths(paths: Iterable[str]) -> list[str]:
    """For Landlock, where there is no root of our own: what may be read."""
    return [path for path in (*paths, *DEVICES) if os.path.exists(path)]
