"""Run programs of a model, which may do anything, so that nothing happens.

    with Sandbox() as sandbox:
        sandbox.script("print(int(input()) + 1)", b"41\\n", seconds=5.0).output       # b"42\\n"
        sandbox.tests("def f(x): return x + 1", "", [assert_test], None, seconds=5.0)  # passed, or why not

What holds a program, at each level (`distill.grading.sandbox.levels`):

    full       namespaces of its own for mounts, process ids, network and IPC, in a read-only root without /proc and
               home; user nobody, no capabilities; seccomp (no new process, no socket, no tracing); Landlock where the
               kernel has it; limits of processor time, clock time, address space, threads, files and output
    landlock   the same without namespaces: Landlock confines the file system instead
    process    limits, and the user nobody where the caller is root; seccomp where the kernel has it

Modules by where they run: `runner` and `levels` in the process that judges, which keeps what is expected; `zygote`,
`walls` and `kernel` in the processes that isolate; `program`, `peer` and `wire` in those of programs, and `peer` and
`wire` on the judging side of a call as well. What runs inside imports the standard library only.
"""
