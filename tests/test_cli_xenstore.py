"""`evtchnctl xenstore` against a daemon: what it prints, what it refuses, what it does on a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evtchnd.vmm.soft import SoftVmm
from test_cli import ENVIRONMENT, TIMEOUT, Running, ctl, running


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("xs") / "run") as it:
        yield it


@pytest.fixture(autouse=True)
def empty(daemon: Running) -> Iterator[None]:
    yield
    assert ctl(daemon.folder, "xenstore", "rm", "/t", "/given").returncode == 0


def say(daemon: Running, *arguments: str) -> str:
    done = ctl(daemon.folder, "xenstore", *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def ask(daemon: Running, *arguments: str) -> Any:
    return json.loads(say(daemon, *arguments, "-o", "json"))


def test_nodes(daemon: Running) -> None:
    assert say(daemon, "write", "/t/a/b", "1", "/t/c", "two words\n") == ""
    assert say(daemon, "read", "/t/a/b", "/t/c") == "1\ntwo words\n\n"
    assert ask(daemon, "read", "/t/a/b", "/t/c") == {"/t/a/b": "1", "/t/c": "two words\n"}
    assert say(daemon, "ls", "/t") == '/t = ""\n a = ""\n  b = "1"\n c = "two words\\n"\n'
    assert say(daemon, "ls", "-p", "/t/a") == '/t/a = ""  (n0)\n b = "1"  (n0)\n'
    assert ask(daemon, "ls", "/t/a") == [
        {"path": "/t/a", "value": "", "perms": ["n0"]},
        {"path": "/t/a/b", "value": "1", "perms": ["n0"]},
    ]
    assert say(daemon, "rm", "/t/a", "/t/c") == ""
    assert say(daemon, "ls", "/t") == '/t = ""\n'
    assert ' t = ""\n' in say(daemon, "ls")


def test_many_nodes(daemon: Running) -> None:
    pairs = [text for number in range(1000) for text in (f"/t/node-{number}", str(number))]
    say(daemon, "write", *pairs)
    rows = ask(daemon, "ls", "/t")
    assert [row["value"] for row in rows] == ["", *map(str, range(1000))]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["read", "/none"], "ENOENT: /none (No such file or directory)"),
        (["ls", "/none"], "ENOENT: /none (No such file or directory)"),
        (["read", "/a//b"], "EINVAL: /a//b (Invalid argument)"),
        (["write", "/t"], "/t: no value (write PATH VALUE ...)"),
        (["write", "/t/a", "1", "/t b", "2"], "EINVAL: /t b (Invalid argument)"),
        (["rm", "/"], "EINVAL: / (Invalid argument)"),
        (["watch", "/a", "//"], "EINVAL: // (Invalid argument)"),
        (["quota", "none"], "no domain named 'none' (evtchnctl list)"),
        (["quota", "7", "size"], "no quota named 'size': nodes, watches, "),
        (["quota", "7", "nodes", "x"], "'x' is no number of 0 (not checked) or more"),
        (["quota", "7", "nodes", "9999999999"], "EINVAL: quota nodes 9999999999 (Invalid argument)"),
        (["quota", "40000"], "ENOENT: quota nodes (No such file or directory)"),
    ],
)
def test_what_is_refused_is_one_line(daemon: Running, arguments: list[str], reason: str) -> None:
    done = ctl(daemon.folder, "xenstore", *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"evtchnctl: [^\n]+\n", done.stderr)
    assert reason in done.stderr
    # all of it or nothing
    assert ctl(daemon.folder, "xenstore", "read", "/t/a").returncode == 1


def test_nobody_there(tmp_path: Path) -> None:
    done = ctl(tmp_path, "xenstore", "ls")
    said = f"evtchnctl: {tmp_path}/xenstored.sock: no evtchnd serves there (--runtime-dir names its folder)\n"
    assert (done.returncode, done.stderr) == (1, said)


def test_dry_runs_are_checked_and_change_nothing(daemon: Running) -> None:
    say(daemon, "write", "/t/a", "1")
    assert say(daemon, "write", "/t/a", "2", "/t/b", "3", "--dry-run") == "would write /t/a, /t/b\n"
    assert say(daemon, "rm", "/t/a", "--dry-run") == "would remove /t/a\n"
    assert ctl(daemon.folder, "xenstore", "rm", "/none/none", "--dry-run").returncode == 1
    assert say(daemon, "quota", "9", "nodes", "5", "--dry-run")
    assert ask(daemon, "quota", "9")["nodes"]["limit"] == 1000
    assert ask(daemon, "ls", "/t") == [
        {"path": "/t", "value": "", "perms": ["n0"]},
        {"path": "/t/a", "value": "1", "perms": ["n0"]},
    ]


def test_watch(daemon: Running) -> None:
    command = [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", str(daemon.folder), "xenstore"]
    watch = [*command, "watch", "/t", "/given", "-n", "4", "-o", "json", "--depth", "1"]
    with subprocess.Popen(watch, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert {process.stdout.readline() for _ in range(2)} == {'{"path": "/t"}\n', '{"path": "/given"}\n'}
        say(daemon, "write", "/t/a/deep", "1")
        say(daemon, "write", "/t/a", "1")
        assert process.stdout.readline() == '{"path": "/t/a"}\n'
        say(daemon, "write", "/given", "1")
        assert process.stdout.readline() == '{"path": "/given"}\n'
        assert process.wait(TIMEOUT) == 0


def test_a_watch_is_told_of_the_end_of_the_daemon(tmp_path: Path) -> None:
    with running(tmp_path) as it:
        command = [
            sys.executable,
            "-m",
            "evtchnd.cli.evtchnctl",
            "--runtime-dir",
            str(tmp_path),
            "xenstore",
            "watch",
            "/t",
        ]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, env=ENVIRONMENT, stdout=pipe, stderr=pipe, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "/t\n"
            it.end()
            _, said = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, said) == (1, f"evtchnctl: {tmp_path}/xenstored.sock: xenstore: connection lost\n")


def test_quotas_of_a_running_guest(daemon: Running) -> None:
    with SoftVmm(daemon.folder / "vmm.sock", 7, memory=8 << 20, name="guest"):
        before = ask(daemon, "quota", "guest")
        assert before["nodes"]["limit"] == 1000
        assert before["nodes"]["used"] == before["nodes"]["most"] > 0
        changed = ask(daemon, "quota", "guest", "nodes", "1500")
        assert changed == {"nodes": {**before["nodes"], "limit": 1500}}
        lines = say(daemon, "quota", "7").splitlines()
        assert lines[0].split() == ["used", "most", "limit", "refused"]
        assert lines[1].split() == ["nodes", str(before["nodes"]["used"]), str(before["nodes"]["most"]), "1500", "0"]
    assert say(daemon, "quota", "default", "watches").splitlines()[1].split() == ["watches", "128"]
    assert ask(daemon, "quota", "default", "watches", "200") == {"watches": {"limit": 200}}
    assert ask(daemon, "quota", "9", "watches")["watches"]["limit"] == 200
    ask(daemon, "quota", "default", "watches", "128")


def test_quotas_of_the_config(tmp_path: Path) -> None:
    file = tmp_path / "evtchnd.toml"
    file.write_text("[xenstore]\nwatches = 77\n[[domains]]\ndomid = 7\nxenstore = {nodes = 1234}\n")
    with running(tmp_path / "run", "--config", str(file)) as it, SoftVmm(it.folder / "vmm.sock", 7, memory=8 << 20):
        quotas = ask(it, "quota", "7")
        assert (quotas["nodes"]["limit"], quotas["watches"]["limit"]) == (1234, 77)
        assert ask(it, "quota", "default", "nodes") == {"nodes": {"limit": 1000}}


def test_a_reload_changes_the_quotas_of_running_domains(tmp_path: Path) -> None:
    """SIGHUP: what of the file has changed, and nothing else that a tool has set; a faulty file changes nothing."""
    file = tmp_path / "evtchnd.toml"
    own = "[[domains]]\ndomid = 7\nxenstore = {nodes = %d}\n"
    file.write_text("[xenstore]\nwatches = 77\n" + own % 1234)

    def reloaded(text: str, until: str) -> None:
        file.write_text(text)
        it.process.send_signal(signal.SIGHUP)
        assert it.process.stderr is not None
        while until not in it.process.stderr.readline():
            pass

    def limits(domain: str) -> tuple[int, int]:
        quotas = ask(it, "quota", domain)
        return quotas["nodes"]["limit"], quotas["watches"]["limit"]

    with (
        running(tmp_path / "run", "--config", str(file)) as it,
        SoftVmm(it.folder / "vmm.sock", 7, memory=8 << 20),
        SoftVmm(it.folder / "vmm.sock", 8, memory=8 << 20),
    ):
        ask(it, "quota", "8", "nodes", "500")
        reloaded("[xenstore]\nwatches = 77\n" + own % 99, "reloaded")
        assert (limits("7"), limits("8"), limits("default")) == ((99, 77), (500, 77), (1000, 77))
        reloaded("[xenstore]\nwatches = 90\n[poll]\nmax_us = 7\n", "reloaded, but poll: from the next start on")
        assert (limits("7"), limits("8"), limits("default")) == ((1000, 90), (500, 90), (1000, 90))
        reloaded("[xenstore]\nwatches = -1\n", "not reloaded: everything is as before")
        assert limits("default") == (1000, 90)


def on_a_terminal(daemon: Running, *arguments: str, **environment: str) -> str:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "evtchnd.cli.evtchnctl", "--runtime-dir", str(daemon.folder), "xenstore"]
    env = {key: value for key, value in ENVIRONMENT.items() if key != "NO_COLOR"} | {"TERM": "xterm"} | environment
    with subprocess.Popen([*command, *arguments], env=env, stdout=theirs) as process:
        os.close(theirs)
        said = b""
        try:
            while data := os.read(ours, 4096):
                said += data
        except OSError:
            pass  # the other end of a pty is gone: EIO
        finally:
            os.close(ours)
        assert process.wait(TIMEOUT) == 0
    return said.decode().replace("\r\n", "\n")


def test_colours_on_a_terminal_and_nothing_that_a_guest_wrote(daemon: Running) -> None:
    say(daemon, "write", "/t/a", '\x1b]0;owned\x07"\u202e')
    shown = '\\x1b]0;owned\\x07"\\u202e'
    assert on_a_terminal(daemon, "ls", "/t/a") == f'\x1b[34m/t/a\x1b[0m = \x1b[32m"{shown}"\x1b[0m\n'
    assert on_a_terminal(daemon, "read", "/t/a") == f"\x1b[32m{shown}\x1b[0m\n"
    assert on_a_terminal(daemon, "ls", "/t/a", NO_COLOR="1") == f'/t/a = "{shown}"\n'
    assert say(daemon, "read", "/t/a") == '\x1b]0;owned\x07"\u202e\n'
