"""Imports point down only (docs/guide.md, "Folders"): read from the source, nothing is run."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PRODUCT = sorted([*ROOT.glob("evtchnd/**/*.py"), *ROOT.glob("backends/**/*.py")])

# Each layer: what belongs to it, and which layers it may import besides itself.
LAYERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "base": (("abi", "errors", "blkif", "netif", "diskspec", "vifspec", "seldom", "spurious"), ()),
    "core": (("_core", "memory", "grants", "ring", "stream", "journal", "answers"), ("base",)),
    "ports": (("ports",), ("base",)),
    "wire": (("protocol", "messages", "tables", "transport"), ("base",)),
    "store": (
        tuple(
            f"xenstore.{name}"
            for name in (
                "wire",
                "tree",
                "store",
                "operations",
                "quota",
                "watches",
                "contention",
                "request",
                "administration",
                "control",
                "migration",
                "log",
                "recorder",
                "restore",
            )
        ),
        ("base", "core._core.words", "core._core.nodes"),
    ),
    "xenstore": (("xenstore",), ("base", "core", "store", "channel")),
    "channel": (("channel", "_core.channel", "_core.poller"), ("base", "core")),
    "xenbus": (("xenbus",), ("base", "store", "xenstore")),
    "worker": (("worker",), ("base", "core", "wire", "store", "xenstore", "channel", "xenbus", "config")),
    "config": (("control.config",), ("base",)),
    "control": (
        ("control",),
        ("base", "core", "wire", "store", "xenstore", "channel", "xenbus", "worker", "config"),
    ),
    "vmm": (("vmm",), ("base", "core.memory", "ports", "wire")),
    "guest": (("guest",), ("base", "core", "store", "vmm", "ports")),
    "operator": (("__main__", "keeper", "cli", "demo", "bench"), ("*",)),
}
# The one line that binds the backends to the worker, and a worker that dies at each step.
BINDINGS = ("evtchnd.worker.main", "evtchnd.bench.crashpump")
NO_ASYNCIO = ("base", "core", "ports", "wire", "store", "vmm", "guest")


def module_of(path: Path) -> str:
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "backends":
        parts = parts[1:]
    if parts[-1] == "__init__":
        parts.pop()
    return ".".join(parts)


def layer_of(module: str) -> str:
    """The layer with the longest matching name; "" for the package itself."""
    inner = module.removeprefix("evtchnd").lstrip(".")
    best = ("", -1)
    for layer, (names, _) in LAYERS.items():
        for name in names:
            if (inner == name or inner.startswith(name + ".")) and len(name) > best[1]:
                best = (layer, len(name))
    return best[0]


def imports(path: Path) -> Iterator[tuple[int, str]]:
    module = module_of(path)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
                base = ".".join([*package[: len(package) - node.level + 1], *([base] if base else [])])
            known = {module_of(p) for p in PRODUCT}
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base


def may(module: str, target: str) -> bool:
    if target.startswith("evtchnd_backends"):
        return module.startswith("evtchnd_backends") or module in BINDINGS
    if module.startswith("evtchnd_backends"):
        return layer_of(target) not in ("control", "vmm", "guest", "operator")
    source, wanted = layer_of(module), layer_of(target)
    if source == "" or wanted in ("", source):
        return wanted in ("", source) or source != ""
    allowed = LAYERS[source][1]
    inner = target.removeprefix("evtchnd.")
    return "*" in allowed or wanted in allowed or f"{wanted}.{inner}" in allowed


@pytest.mark.parametrize("path", PRODUCT, ids=module_of)
def test_imports_point_down(path: Path) -> None:
    module = module_of(path)
    assert layer_of(module) or module in ("evtchnd", "evtchnd_backends") or module.startswith("evtchnd_backends."), (
        f"{module} is in no layer: add it to LAYERS"
    )
    wrong = [
        f"{path.name}:{line}: {target}"
        for line, target in imports(path)
        if target.split(".")[0] in ("evtchnd", "evtchnd_backends") and not may(module, target)
    ]
    assert not wrong


@pytest.mark.parametrize("path", [p for p in PRODUCT if layer_of(module_of(p)) in NO_ASYNCIO], ids=module_of)
def test_no_asyncio_below_the_line(path: Path) -> None:
    wrong = [line for line, target in imports(path) if target.split(".")[0] in ("asyncio", "uvloop")]
    assert not wrong, f"{path} imports an event loop in line {wrong}"


def test_the_table_sees_a_wrong_import() -> None:
    assert not may("evtchnd.ring", "evtchnd.channel")
    assert not may("evtchnd.vmm.soft", "evtchnd.control.daemon")
    assert not may("evtchnd.channel", "evtchnd_backends.blkback")
    assert not may("evtchnd_backends.blkback", "evtchnd.control.daemon")
    assert may("evtchnd.worker.main", "evtchnd_backends.blkback")
    assert may("evtchnd.vmm.soft", "evtchnd.memory")


def test_only_declared_packages_are_imported() -> None:
    allowed = {*sys.stdlib_module_names, "evtchnd", "evtchnd_backends", "uvloop", "pyroute2", "msgspec"}
    optional = {"rich": ("cli", "demo", "bench"), "matplotlib": ("bench",), "cython": ("_core",), "Cython": ("_core",)}
    wrong = []
    for path in PRODUCT:
        inner = module_of(path).removeprefix("evtchnd.")
        for line, target in imports(path):
            top = target.split(".")[0]
            if top not in allowed and not inner.startswith(optional.get(top, ("\0",))):
                wrong.append(f"{path}:{line}: {target}")
    assert not wrong
