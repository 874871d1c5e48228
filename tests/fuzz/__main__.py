"""Every target of targets.py gets bytes of chance, led by coverage (atheris, libFuzzer), for a limited time.

    python tests/fuzz [--seconds S] [TARGET ...]        all of them: S seconds in all
    python tests/fuzz --one TARGET [LIBFUZZER'S OPTIONS]

Begins with tests/corpus/TARGET. What is found goes to .cache/fuzz/TARGET: new inputs, and `crash-...` for a find, which
ends with status 1. A find becomes a file of tests/corpus/TARGET, which tests/test_fuzz.py replays.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CORPUS, FOUND = ROOT / "tests" / "corpus", ROOT / ".cache" / "fuzz"
sys.path[:0] = [str(ROOT / name) for name in (".", "backends", "tests", "tests/fuzz")]
# An input that takes so long is a find: what one guest sends must not keep its host busy.
SLOW_S = 10
MOST_BYTES = 8192


def one(target: str, options: Sequence[str]) -> int:
    """libFuzzer, in this process; it does not come back."""
    import atheris

    with atheris.instrument_imports(include=["evtchnd"]):
        from targets import TARGETS
    atheris.Setup([sys.argv[0], *options], TARGETS[target])
    atheris.Fuzz()
    return 0


def every(targets: Sequence[str], seconds: float) -> int:
    """Each in a process of its own, one after the other."""
    wrong = []
    for target in targets:
        found = FOUND / target
        found.mkdir(parents=True, exist_ok=True)
        limits = [f"-max_total_time={max(1, int(seconds / len(targets)))}", f"-timeout={SLOW_S}"]
        limits += [f"-max_len={MOST_BYTES}", f"-artifact_prefix={found}/", "-rss_limit_mb=2048"]
        command = [sys.executable, __file__, "--one", target, str(found), str(CORPUS / target), *limits]
        # instructions are counted in Python only: the core is run as Python
        done = subprocess.run(
            command, env={**os.environ, "EVTCHND_PURE": "1"}, capture_output=True, text=True, check=False
        )
        runs = [line for line in done.stderr.splitlines() if line.startswith("Done ")]
        print(f"{target}: {runs[-1] if runs else f'ended with {done.returncode}'}", flush=True)
        if done.returncode:
            wrong.append(target)
            print(done.stderr[-4000:], file=sys.stderr)
    if wrong:
        print(f"finds: {', '.join(wrong)}; their inputs are in {FOUND}", file=sys.stderr)
    return 1 if wrong else 0


def main(argv: Sequence[str]) -> int:
    if argv[:1] == ["--one"]:
        return one(argv[1], argv[2:])
    from targets import TARGETS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("targets", nargs="*", metavar="TARGET", choices=[*TARGETS, []])
    arguments = parser.parse_args(argv)
    return every(arguments.targets or list(TARGETS), arguments.seconds)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
