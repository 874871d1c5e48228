"""Stands in for `import cython` where Cython is not installed and the core runs as Python.

Only what the core's modules use outside `if cython.compiled:`; annotations are never evaluated.
"""

from __future__ import annotations

compiled = False
