"""What a benchmark hands over: machine, rounds, ratios, what was skipped and why; as table, JSON and picture."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from evtchnd import _core
from evtchnd.errors import HostError

PLOTS_ACROSS = 4
COLOURS = ["#2b6cb0", "#a0aec0", "#dd6b20", "#718096"]


def machine() -> dict[str, Any]:
    """Processor, cores, memory (bytes), kernel and versions of what was measured."""
    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    versions = {"python": platform.python_version()}
    for package in ("evtchnd", "uvloop", "msgspec", "cython"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None  # type: ignore[assignment]
    return {
        "processor": model,
        "cpus": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "kernel": f"{platform.system()} {platform.release()}",
        "core_compiled": _core.COMPILED,
        "versions": versions,
    }


def median(values: Sequence[float]) -> float:
    """Median of `values`; they must not be empty."""
    return statistics.median(values)


@dataclass
class Report:
    """One run of a benchmark.

    ratios     dotted name -> number, or None where it was not run
    skipped    dotted name (or a leading part of it) -> reason
    rounds     every single reading, in the order in which it was taken
    rows       what the table shows: (label, {column: text})
    series     what the picture shows: title -> {label: value}
    machines   where readings come from that were not taken on this machine: place -> machine()
    """

    name: str
    ratios: dict[str, float | None] = field(default_factory=dict)
    bounds: dict[str, tuple[str, float]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    rows: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    series: dict[str, dict[str, float]] = field(default_factory=dict)
    machines: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ratio(self, name: str, value: float | None, bound: tuple[str, float]) -> None:
        """Notes a ratio and what it must reach: ("<=" or ">=", limit)."""
        self.ratios[name] = None if value is None else round(value, 4)
        self.bounds[name] = bound

    def as_json(self) -> dict[str, Any]:
        """The object that --json writes."""
        return {
            "benchmark": self.name,
            "machine": machine(),
            **({"machines": self.machines} if self.machines else {}),
            "ratios": self.ratios,
            "bounds": {name: f"{sign} {limit}" for name, (sign, limit) in self.bounds.items()},
            "skipped": self.skipped,
            "rounds": self.rounds,
        }

    def table(self) -> str:
        """Readings and ratios as plain text, for standard error."""
        out = []
        if self.rows:
            columns = list(dict.fromkeys(column for _, cells in self.rows for column in cells))
            lines = [["", *columns]] + [[label, *(cells.get(c, "") for c in columns)] for label, cells in self.rows]
            out += _aligned(lines)
        out.append("")
        lines = [["ratio", "value", "must be"]]
        for name, value in self.ratios.items():
            sign, limit = self.bounds[name]
            shown = "not run" if value is None else f"{value:.3f}"
            lines.append([name, shown, f"{sign} {limit:g}{'' if _holds(value, sign, limit) else '   MISSED'}"])
        out += _aligned(lines)
        out += [f"skipped: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(out)


def _holds(value: float | None, sign: str, limit: float) -> bool:
    return value is None or (value <= limit if sign == "<=" else value >= limit)


def _aligned(lines: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]

    def laid(line: list[str]) -> str:
        cells = zip(line, widths, strict=True)
        return "  ".join(cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(cells))

    return [laid(line) for line in lines]


def write(report: Report, *, json_file: str | None, plot_file: str | None) -> None:
    """Table to standard error; JSON to a file, or alone on standard output for "-"; an SVG picture."""
    print(report.table(), file=sys.stderr)
    if json_file == "-":
        json.dump(report.as_json(), sys.stdout, indent=2)
        print()
    elif json_file:
        Path(json_file).write_text(json.dumps(report.as_json(), indent=2) + "\n")
    if plot_file:
        plot(report.name, report.series, plot_file)


def plot(name: str, series: Mapping[str, Mapping[str, float]], file: str) -> None:
    """One bar chart a title, in rows. HostError without matplotlib (extra `bench`)."""
    try:
        import matplotlib
    except ImportError:
        raise HostError("--plot needs matplotlib: pip install 'evtchnd[bench]'") from None
    matplotlib.use("svg")
    from matplotlib import pyplot

    across = min(len(series), PLOTS_ACROSS) or 1
    down = -(-len(series) // across) or 1
    figure, axes = pyplot.subplots(down, across, figsize=(4 * across, 3.2 * down), squeeze=False)
    for axis in axes.flat[len(series) :]:
        axis.set_visible(False)
    for axis, (title, bars) in zip(axes.flat, series.items(), strict=False):
        drawn = axis.bar(
            list(bars), list(bars.values()), color=["#2b6cb0", "#a0aec0", "#dd6b20", "#718096"][: len(bars)]
        )
        axis.bar_label(drawn, fmt="%.3g")
        axis.set_title(title, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    host = machine()
    figure.suptitle(f"evtchnd-bench {name}: {host['processor']}, {host['cpus']} CPUs, {host['kernel']}", fontsize=8)
    figure.tight_layout()
    figure.savefig(file)
