"""Builds the compiled core where a C compiler is; without one the core runs as Python, and this says so.

EVTCHND_REQUIRE_EXT=1 makes a missing or failing compiler an error (CI). Everything else is in pyproject.toml.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = Path("evtchnd/_core")
NOT_COMPILED = {"__init__.py", "nocython.py", "points.py"}


def required() -> bool:
    return os.environ.get("EVTCHND_REQUIRE_EXT", "0") not in ("", "0")


class OptionalBuildExt(build_ext):
    """`Extension(optional=True)` does not survive a missing gcc, so the whole step may fail here."""

    def run(self) -> None:
        inplace = self.inplace  # setuptools forgets it when a compiler fails
        try:
            super().run()
        except Exception as error:  # whatever the tool chain throws: distutils, OSError, Cython's CompileError
            self._go_on_without(error, inplace=bool(inplace))

    def get_source_files(self) -> list[str]:
        return [str(path) for path in sorted(CORE.iterdir()) if path.suffix in (".py", ".pxd", ".h")]

    def _go_on_without(self, error: Exception, *, inplace: bool) -> None:
        if required():
            raise error
        # all or none: the modules are compiled against one another
        for extension in self.extensions:
            name = self.get_ext_filename(extension.name)
            Path(self.build_lib, name).unlink(missing_ok=True)
            if inplace:
                Path(name).unlink(missing_ok=True)
        self.extensions = []
        reason = str(error).strip().splitlines()
        print(
            "evtchnd: WARNING: the core is not compiled, it runs as Python (about 5 times slower): "
            f"{reason[-1] if reason else type(error).__name__}. Install gcc and Python's headers and install again; "
            "the Python form needs libatomic.so.1 (Debian: libatomic1).",
            file=sys.stderr,
        )


def extensions() -> list[Extension]:
    found = [
        Extension(
            f"evtchnd._core.{path.stem}",
            [str(path)],
            include_dirs=[str(CORE)],
            depends=[str(path) for pattern in ("*.h", "*.pxd") for path in sorted(CORE.glob(pattern))],
            extra_compile_args=["-O2", "-fno-strict-aliasing", "-Wno-sign-compare"],
        )
        for path in sorted(CORE.glob("*.py"))
        if path.name not in NOT_COMPILED
    ]
    try:
        from Cython.Build import cythonize
    except ImportError:
        if required():
            raise
        print("evtchnd: WARNING: Cython is missing, the core runs as Python (about 5 times slower)", file=sys.stderr)
        return []
    return list(cythonize(found, compiler_directives={"language_level": "3"}, quiet=True))


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuildExt})
