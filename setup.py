"""The compiled part of the package. Everything else is in pyproject.toml, whose table for this is experimental."""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("distill/engine/kernels/native")
# Loaded with ctypes: a C interface, no Python or torch header. Optional: without a compiler the reference kernels run.
# Sums must not depend on which multiply-adds a compiler happens to fuse, hence -ffp-contract.
cpu = Extension(
    "distill.engine.kernels._cpu",
    sources=[str(NATIVE / "library.cpp")],
    depends=sorted(str(path) for path in NATIVE.rglob("*.h")),
    extra_compile_args=["-std=c++20", "-O3", "-ffp-contract=off", "-pthread", "-Wno-psabi"],
    extra_link_args=["-pthread"],
    optional=True,
)

setup(ext_modules=[cpu])
