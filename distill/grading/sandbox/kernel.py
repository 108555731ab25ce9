"""Kernel calls that isolate a process and that Python's standard library does not offer.

Through ctypes, because a program's own process makes them between `fork` and its first line: no helper binary is
executed, so nothing has to be installed and a warm interpreter stays warm. Namespaces, mounts, capabilities, Landlock
and a seccomp filter; x86-64 and aarch64. Every call raises OSError with the name of the call.

The seccomp filter denies what no answer needs: new processes (threads are allowed, so the address space limit of one
process bounds the memory of a program), sockets, signals to others, tracing, mounts, namespaces, keys, BPF, and memory
that no limit counts (`memfd_create`, System V). A list of denied calls and not of allowed ones, because the C library's
calls differ between versions, and namespaces and the user id already hold a call that a newer kernel adds.

Rejected: pyseccomp (needs the libseccomp library at run time, and unmaintained since 2021); sandlock 0.9 (19 ms a
program because each is a new interpreter, keeps the user id of a root caller, kills at the memory limit where Python
raises MemoryError).
"""

import ctypes
import os
import platform
import struct
import sys
from collections.abc import Iterable, Sequence
from functools import cache

NEWNS, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 4096, 16384, 1 << 18
MNT_DETACH = 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV = 1, 2, 4  # of mount_setattr
AT_FDCWD, AT_RECURSIVE = -100, 0x8000
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
READ_ANYWHERE = 1 << 2  # CAP_DAC_READ_SEARCH
THREAD = 0x10000  # CLONE_THREAD

EPERM, EAGAIN, ENOSYS = 1, 11, 38
READ_FILE, READ_DIR, EXECUTE = 1 << 2, 1 << 3, 1 << 0  # rights of Landlock
FILE_RIGHTS = 0b111 | 1 << 14 | 1 << 15  # execute, write, read; truncate; ioctl: the rights that a file has

PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
MOUNT_SETATTR, LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 442, 444, 445, 446  # the same everywhere

ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # AUDIT_ARCH_…
# name → number on x86-64, on aarch64 (None: there is no such call)
DENIED: dict[str, tuple[int | None, int | None]] = {
    "execve": (59, 221),
    "execveat": (322, 281),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "socket": (41, 198),
    "connect": (42, 203),
    "bind": (49, 200),
    "listen": (50, 201),
    "accept": (43, 202),
    "accept4": (288, 242),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "unshare": (272, 97),
    "setns": (308, 268),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "personality": (135, 92),
    "quotactl": (179, 60),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "reboot": (169, 142),
    "sethostname": (170, 161),
    "setdomainname": (171, 162),
    "settimeofday": (164, 170),
    "clock_settime": (227, 112),
    "adjtimex": (159, 171),
    "clock_adjtime": (305, 266),
    "acct": (163, 89),
    "syslog": (103, 116),
    "shmget": (29, 194),
    "shmat": (30, 196),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "mknod": (133, None),
    "mknodat": (259, 33),
}
FORKS: dict[str, tuple[int | None, int | None]] = {"fork": (57, None), "vfork": (58, None)}
SELF = 0x7E57C0DE  # stands for the process id in the template of the filter
CLONE, CLONE3, KILL, TGKILL, PRLIMIT = (56, 220), (435, 435), (62, 129), (234, 131), (302, 261)


def _call(name: str, result: int) -> int:
    """The result of a call. Errors: OSError where it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _syscall(name: str, number: int, *arguments: object) -> int:
    return _call(name, int(_libc().syscall(ctypes.c_long(number), *arguments)))


def _column() -> int:
    """Which number of a call this machine uses: 0 or 1. Errors: OSError on another architecture."""
    machine = platform.machine()
    if sys.platform != "linux" or machine not in ARCHITECTURES:
        raise OSError(ENOSYS, f"isolation on {sys.platform} {machine}: {os.strerror(ENOSYS)}")
    return list(ARCHITECTURES).index(machine)


# ---- namespaces and mounts


def unshare(flags: int) -> None:
    """Move this process (NEWPID: its future children) into new namespaces."""
    _call("unshare", int(_libc().unshare(ctypes.c_int(flags))))


def own_pid_namespace() -> int:
    """A descriptor of this process by which `setns` returns to its own pid namespace."""
    return os.pidfd_open(os.getpid())


def setns(descriptor: int, flags: int) -> None:
    """Enter the namespaces of the process behind a pidfd."""
    _call("setns", int(_libc().setns(ctypes.c_int(descriptor), ctypes.c_int(flags))))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    """mount(2)."""
    texts = [None if text is None else os.fsencode(text) for text in (source, target, kind, data)]
    _call(
        f"mount {target}",
        int(_libc().mount(texts[0], texts[1], texts[2], ctypes.c_ulong(flags), texts[3])),
    )


def protect_mount(target: str, attributes: int, recursive: bool = True) -> None:
    """Add mount attributes (ATTR_RDONLY, …) to a mount, and to those below it."""
    _column()
    attr = struct.pack("QQQQ", attributes, 0, 0, 0)
    flags = AT_RECURSIVE if recursive else 0
    where = ctypes.c_char_p(os.fsencode(target))
    _syscall(f"mount_setattr {target}", MOUNT_SETATTR, AT_FDCWD, where, ctypes.c_uint(flags), attr, ctypes.c_size_t(32))


def enter_root(path: str) -> None:
    """Make a mounted directory the root and detach the old one."""
    _column()
    os.chdir(path)
    dot = ctypes.c_char_p(b".")
    _syscall("pivot_root", PIVOT_ROOT[platform.machine()], dot, dot)
    _call("umount2", int(_libc().umount2(b".", MNT_DETACH)))
    os.chdir("/")


# ---- privileges


def keep_capabilities() -> None:
    """Have a change of the user id leave the permitted capabilities as they are."""
    _call("prctl", int(_libc().prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0)))


def drop_capabilities(kept: int = 0) -> None:
    """Give up every capability but those of a mask, and the right to gain one by executing a file."""
    header, data = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", kept, kept, 0, 0, 0, 0)
    _call("capset", int(_libc().capset(header, data)))
    _call("prctl", int(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))


def die_with_parent(signal_number: int) -> None:
    """Have the kernel send a signal to this process when its parent ends."""
    _call("prctl", int(_libc().prctl(PR_SET_PDEATHSIG, signal_number, 0, 0, 0)))


# ---- Landlock


def landlock_version() -> int:
    """The version of Landlock that the kernel has; 0 where it has none."""
    try:
        _column()
        return _syscall("landlock", LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    except OSError:
        return 0


def landlock(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Confine this process to reading below `readable`, and to reading and writing below `writable`. No TCP; no
    signals and abstract sockets past its own domain, where the kernel has that."""
    version = landlock_version()
    everything = (1 << (13, 13, 14, 15, 15, 16)[min(version, 5)]) - 1
    network, scoped = (3 if version >= 4 else 0), (3 if version >= 6 else 0)
    attributes = struct.pack("QQQ", everything, network, scoped)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    size = ctypes.c_size_t(len(attributes))
    ruleset = _syscall("landlock_create_ruleset", LANDLOCK_CREATE, attributes, size, ctypes.c_uint32(0))
    for paths, rights in ((readable, READ_FILE | READ_DIR | EXECUTE), (writable, everything)):
        for path in paths:
            target = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = rights if os.path.isdir(path) else rights & FILE_RIGHTS & everything
            rule = struct.pack("=Qi", allowed, target)
            _syscall("landlock_add_rule", LANDLOCK_ADD, ctypes.c_int(ruleset), 1, rule, ctypes.c_uint32(0))
            os.close(target)
    _call("prctl", int(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    _syscall("landlock_restrict_self", LANDLOCK_RESTRICT, ctypes.c_int(ruleset), ctypes.c_uint32(0))
    os.close(ruleset)


# ---- seccomp


def seccomp_filter(pid: int) -> bytes:
    """The BPF program, see the module. pid: of the process that will run under it, which may signal itself."""
    return _filter_template().replace(struct.pack("I", SELF), struct.pack("I", pid))


@cache  # a zygote makes it once, and its programs have it
def _filter_template() -> bytes:
    column = _column()
    load, jump_equal, jump_set, jump_greater, give = 0x20, 0x15, 0x45, 0x35, 0x06
    refuse, allow, kill = 0x50000, 0x7FFF0000, 0x80000000
    number, architecture, first_argument = 0, 4, 16

    def line(code: int, value: int, yes: int = 0, no: int = 0) -> tuple[int, int, int, int]:
        return code, yes, no, value

    program = [line(load, architecture), line(jump_equal, list(ARCHITECTURES.values())[column], 1, 0), line(give, kill)]
    program += [line(load, number), line(jump_greater, 0x40000000, 0, 1), line(give, refuse | ENOSYS)]  # x32

    def rule(call: int | None, *body: tuple[int, int, int, int]) -> list[tuple[int, int, int, int]]:
        return [] if call is None else [line(jump_equal, call, 0, len(body)), *body]

    for numbers in DENIED.values():
        program += rule(numbers[column], line(give, refuse | EPERM))
    for numbers in FORKS.values():
        program += rule(numbers[column], line(give, refuse | EAGAIN))
    program += rule(CLONE3[column], line(give, refuse | ENOSYS))  # the C library then uses clone, whose flags are seen
    argument = line(load, first_argument)
    program += rule(
        CLONE[column], argument, line(jump_set, THREAD, 0, 1), line(give, allow), line(give, refuse | EAGAIN)
    )
    for call in (KILL[column], TGKILL[column]):
        program += rule(call, argument, line(jump_equal, SELF, 0, 1), line(give, allow), line(give, refuse | EPERM))
    program += rule(PRLIMIT[column], argument, line(jump_equal, 0, 0, 1), line(give, allow), line(give, refuse | EPERM))
    program.append(line(give, allow))
    return b"".join(struct.pack("HBBI", *one) for one in program)


def seccomp(program: Sequence[int] | bytes) -> None:
    """Install a filter for good; needs `drop_capabilities` before."""
    buffer = ctypes.create_string_buffer(bytes(program), len(program))
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(buffer))
    _call("prctl", int(_libc().prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)))
    _call("seccomp", int(_libc().prctl(PR_SET_SECCOMP, 2, header, 0, 0)))
