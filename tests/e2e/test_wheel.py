"""A wheel and an editable install, each in a fresh virtual environment: both find the catalogs, neither leaks a name.

Without a network: the environments see this one's libraries through a .pth file, and nothing is built in isolation.
Without a compiler, too, as the kernels are optional and take a minute to compile; the slow tests compile them.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest

from distill.engine.kernels import cpu

ROOT = Path(__file__).resolve().parents[2]
CATALOGS = ("benchmarks", "recipes", "students", "teachers")
SOURCE = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "distill", *CATALOGS)


def run(*command: object, cwd: Path, **variables: str) -> str:
    environment = ENVIRONMENT | variables
    result = subprocess.run([str(c) for c in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


ENVIRONMENT = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"PIP_NO_INDEX": "1"}
PYTHON_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"


class Environment:
    """A fresh virtual environment with this one's libraries on its path, after its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=directory.parent)
        self.site = directory / "lib" / PYTHON_VERSION / "site-packages"
        (self.site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
        self.nowhere = directory / "empty"  # to run from: nothing to import, nothing to find
        self.nowhere.mkdir()

    def install(self, *arguments: object) -> set[str]:
        """Returns the names that appeared in site-packages."""
        before = set(os.listdir(self.site))
        pip = (sys.executable, "-m", "pip", "--python", self.directory / "bin" / "python", "install", "--quiet")
        run(*pip, "--no-deps", "--no-build-isolation", "--disable-pip-version-check", *arguments, cwd=self.nowhere)
        return set(os.listdir(self.site)) - before

    def python(self, code: str) -> str:
        return run(self.directory / "bin" / "python", "-c", code, cwd=self.nowhere).strip()

    def distill(self, *arguments: str) -> str:
        return run(self.directory / "bin" / "distill", *arguments, cwd=self.nowhere)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The project's files and nothing else, so that building leaves no trace in the clone."""
    directory = tmp_path_factory.mktemp("source")
    for name in SOURCE:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / name, directory / name)
    return directory


def installed_wheel(source, directory, **variables):
    """An environment with a wheel of the sources, and the names that it added to site-packages."""
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", directory, source)
    run(*build, cwd=directory, **variables)
    (file,) = directory.glob("*.whl")
    environment = Environment(directory / "venv")
    return environment, environment.install(file)


@pytest.fixture(scope="module")
def from_wheel(source, tmp_path_factory):
    return installed_wheel(source, tmp_path_factory.mktemp("wheel"), CC="false", CXX="false")


@pytest.fixture(scope="module")
def editable(source, tmp_path_factory):
    environment = Environment(tmp_path_factory.mktemp("editable") / "venv")
    return environment, environment.install("--editable", source)


def files_under(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


def test_the_wheel_adds_one_name_to_site_packages(from_wheel):
    _, added = from_wheel
    assert {name for name in added if not name.endswith(".dist-info")} == {"distill"}


def test_the_wheel_holds_every_file_of_the_package_and_of_the_catalogs(from_wheel):
    installed = from_wheel[0].site / "distill"
    expected = {name for name in files_under(ROOT / "distill") if not name.endswith(".so")}
    expected |= {f"_catalog/{name}/{file}" for name in CATALOGS for file in files_under(ROOT / name)}
    assert files_under(installed) == expected


def test_a_source_distribution_brings_every_file_of_the_package(source, tmp_path):
    """The sources of the kernels among them: an installation from it compiles them."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, source, cwd=tmp_path)
    (file,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(file) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {f"distill/{name}" for name in files_under(ROOT / "distill") if not name.endswith(".so")}
    assert "distill/engine/kernels/native/isa/products.h" in expected
    assert expected <= names


def test_a_wheel_that_was_built_without_a_compiler_says_so(from_wheel):
    missing = from_wheel[0].python("from distill.engine.kernels import cpu; print(cpu.why_missing())")
    assert "install a C++20 compiler" in missing


@pytest.mark.slow
@pytest.mark.skipif(bool(cpu.why_missing()), reason="no C++ compiler here: the kernels are optional")
def test_a_wheel_brings_its_compiled_kernels(source, tmp_path):
    environment, _ = installed_wheel(source, tmp_path)
    code = "from distill.engine.kernels import cpu; print(cpu.why_missing(), cpu.instruction_set())"
    missing, instructions = environment.python(code).split()
    assert missing == "None" and instructions in ("avx512_bf16", "avx512", "avx2", "portable")


def test_the_installed_command_finds_the_packaged_catalog(from_wheel):
    environment, _ = from_wheel
    assert "tiny" in environment.distill("recipes", "list")
    assert environment.distill("recipes", "show", "tiny") == (ROOT / "recipes" / "tiny.yaml").read_text()
    code = "from distill import catalog; print(catalog.folder('recipe'))"
    assert environment.python(code) == str(environment.site / "distill" / "_catalog" / "recipes")


@pytest.mark.slow  # compiles the kernels once more, as every test environment does
def test_an_editable_install_uses_the_clones_catalog(editable, source):
    environment, added = editable
    assert all("distill" in name for name in added - {"__pycache__"})
    assert environment.python("from distill import catalog; print(catalog.folder('recipe'))") == str(source / "recipes")
    text = (source / "recipes" / "tiny.yaml").read_text().replace("name: tiny", "name: edited")
    (source / "recipes" / "edited.yaml").write_text(text)
    assert "edited" in environment.distill("recipes", "list")
    (source / "recipes" / "edited.yaml").unlink()


@pytest.mark.parametrize("install", ["from_wheel", pytest.param("editable", marks=pytest.mark.slow)])
def test_no_generic_name_can_be_imported(install, request):
    environment, _ = request.getfixturevalue(install)
    code = "import importlib.util as u; print([n for n in {names} if u.find_spec(n)])"
    names = ("cli", "tests", "tools", "perf", *CATALOGS)
    assert environment.python(code.format(names=names)) == "[]"
    assert environment.python(code.format(names=("distill",))) == "['distill']"
