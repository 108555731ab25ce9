"""The compiled library is refused, in one line, where it does not fit the Python code that would call it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from distill.engine.kernels import cpu, cpu_library, cpu_structs

FOLDER = Path(cpu_library.__file__).parent
COMPILED = pytest.mark.skipif(bool(cpu.why_missing()), reason="no compiled kernels: the compiler is optional")

ALTERED = {
    "a field more": "pointer: x; long: x_stride; pointer: weight out; long: out_stride; int: rows c; float: eps; "
    "int: threads unused",
    "a field less": "pointer: x; long: x_stride; pointer: weight out; long: out_stride; int: rows c; float: eps",
    "two fields swapped": "pointer: x; long: x_stride; pointer: out weight; long: out_stride; int: rows c; float: eps; "
    "int: threads",
    "another type of the same size": "pointer: x; long: x_stride; pointer: weight out; long: out_stride; int: rows c "
    "eps threads",
    "another name": "pointer: x; long: x_stride; pointer: weights out; long: out_stride; int: rows c; float: eps; "
    "int: threads",
}


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_kernels_are_there_where_there_is_a_compiler() -> None:
    """Installation goes on without them when the sources do not compile, and most tests of them are skipped then."""
    assert cpu_library.why_missing() is None


@COMPILED
def test_the_library_of_this_installation_is_accepted() -> None:
    assert not isinstance(cpu_library.load(FOLDER), str)


@COMPILED
@pytest.mark.parametrize("change", ALTERED)
def test_another_layout_is_refused(change: str, monkeypatch: pytest.MonkeyPatch) -> None:
    norm = cpu_structs._struct("NormArgs", ALTERED[change])
    others = tuple(norm if s is cpu_structs.NormArgs else s for s in cpu_structs.STRUCTURES)
    monkeypatch.setattr(cpu_structs, "STRUCTURES", others)
    reason = cpu_library.load(FOLDER)
    assert isinstance(reason, str) and "\n" not in reason
    assert "was compiled from other sources" in reason and "python -m pip install -e ." in reason


def test_a_missing_library_names_the_compiler(tmp_path: Path) -> None:
    assert "install a C++20 compiler" in str(cpu_library.load(tmp_path))


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    (tmp_path / "_cpu.so").write_bytes(b"")
    (tmp_path / "_cpu.x86.so").write_bytes(b"not a library")
    reason = cpu_library.load(tmp_path)
    assert isinstance(reason, str) and reason.startswith("_cpu.x86.so cannot be loaded") and "reinstall" in reason


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler here to build another library with")
def test_a_library_without_the_functions_is_refused(tmp_path: Path) -> None:
    """As one of an older version is."""
    source = tmp_path / "other.c"
    source.write_text("const char* distill_isa(const char* name) { return name; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", source, "-o", tmp_path / "_cpu.x86.so"], check=True)
    reason = cpu_library.load(tmp_path)
    assert isinstance(reason, str) and "cannot be loaded" in reason and "distill_layouts" in reason


def test_arguments_are_given_by_name_and_none_is_forgotten() -> None:
    packed = cpu_structs.PackedMatrix(kind=1, n=2, k=3, groups=4, data=5, scale=None)
    assert (packed.kind, packed.n, packed.k, packed.groups, packed.data, packed.scale) == (1, 2, 3, 4, 5, None)
    with pytest.raises(AssertionError, match="PackedMatrix: \\['scale'\\]"):
        cpu_structs.PackedMatrix(kind=1, n=2, k=3, groups=4, data=5)
    with pytest.raises(AssertionError, match="PackedMatrix: \\['size'\\]"):
        cpu_structs.PackedMatrix(kind=1, n=2, k=3, groups=4, data=5, scale=None, size=6)


@COMPILED
def test_the_library_needs_no_stream_of_the_standard_library() -> None:
    """Streams and locales keep state in the C++ library, and a process with CUDA's libraries may hold several copies.

    On one GPU machine the process crashed at the first formatted number."""
    [library] = FOLDER.glob("_cpu.*.so")
    content = library.read_bytes()
    assert b"_Znwm" in content, "the names of imported functions are in the file"
    assert not [name for name in (b"_ZNSo", b"_ZNSt8ios_base", b"_ZNSt6locale") if name in content]
