"""`evtchnd`, the daemon: in the foreground, its log on standard error or in the journal."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import uvloop

from evtchnd import _core, protocol
from evtchnd._core import words
from evtchnd.control import config as configuration
from evtchnd.control import logs, sdnotify, successor
from evtchnd.control.config import Config, ConfigError
from evtchnd.control.daemon import STORE, Daemon
from evtchnd.control.fdstore import DescriptorStore
from evtchnd.control.kept import is_kept, left_of
from evtchnd.control.listening import Listening
from evtchnd.control.operator import NAME, Operator, version
from evtchnd.control.zygote import Zygote
from evtchnd.errors import EvtchndError, HostError
from evtchnd.keeper import Keeper
from evtchnd.xenstore.log import Log

log = logging.getLogger("evtchnd")

# What descriptors of TAPs are called there: tap-NAME (no name has a colon: LISTEN_FDNAMES)
TAP = "tap-"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 ended as told, 1 the host refuses something, 78 (EX_CONFIG) the configuration is wrong."""
    args = _arguments(argv)
    if args.print_capabilities:
        json.dump(capabilities(), sys.stdout, indent=2)
        print()
        return 0
    try:
        config = _config(args)
    except ConfigError as exc:
        for line in exc.faults:
            print(line, file=sys.stderr)
        return os.EX_CONFIG
    if args.check_config:
        return 0
    if args.check_state is not None:
        return _check_state(args.check_state)
    if args.keep:
        return _keeper(config, argv)
    logs.setup(config.log_level, config.log_format)
    notifier = sdnotify.Notifier.from_environment()
    try:
        words.need_atomics()  # every worker would end at its start
        passed = sdnotify.inherited()
        if args.state_fd is not None and not notifier:
            log.info(
                "--state-fd: XenStore survives a restart, disks and vifs do not (systemd and --keep keep those, too)"
            )
        state = _state(args.state_fd, passed, kept=bool(notifier))
        period = sdnotify.watchdog_period()
        # before any loop, thread or socket exists: every worker is a copy of what is here now
        zygote = None if config.single_process else Zygote.fork(sandbox=config.sandbox)
        uvloop.run(_serve(config, zygote, notifier, passed, period, state, partial(_config, args)))
    except EvtchndError as exc:
        log.error("%s", exc)
        return 1
    return 0


def _check_state(held: str) -> int:
    logging.disable()  # what is wrong is said below
    found = successor.faults(json.loads(held), STORE)
    for line in found:
        print(line)
    return 1 if found else 0


def _keeper(config: Config, argv: Sequence[str] | None) -> int:
    """As `--keep`: the same command without it, again and again."""
    rest = [each for each in (sys.argv[1:] if argv is None else argv) if each != "--keep"]
    try:
        return Keeper(Path(config.runtime_dir), [sys.executable, "-m", "evtchnd", *rest]).run()
    except HostError as exc:
        print(exc, file=sys.stderr)
        return 1


async def _serve(
    config: Config,
    zygote: Zygote | None,
    notifier: sdnotify.Notifier,
    passed: Mapping[str, Sequence[int]],
    period: float | None,
    state: Log | None,
    reread: Callable[[], Config],
) -> None:
    """The daemon's life, until a signal ends it; SIGHUP: its configuration is read again."""
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    taps = {name.removeprefix(TAP): fds for name, fds in passed.items() if name.startswith(TAP)}
    others = {
        name: fds for name, fds in passed.items() if name != STORE and not name.startswith(TAP) and not is_kept(name)
    }
    listening = Listening(config, others)
    left = left_of(passed)
    if left and all(each.old for each in left.values()):
        # as they all would be refused, and their VMMs might give up: nothing is lost until the right one is started
        raise HostError("no domain's state can be read: start the version that wrote it")
    held = [name for name, fds in passed.items() for _ in fds]
    keeper = DescriptorStore(notifier, held, _most_kept(config))
    daemon = Daemon(
        config,
        zygote=zygote,
        listening=listening.sockets,
        log_of_store=state,
        taps=taps,
        keeper=keeper,
        left=left,
    )

    async def upgrade() -> None:
        """The program that is installed now takes over, or says why it cannot."""
        await successor.ask(daemon.held(), sys.orig_argv[1:])
        told.set()

    operator = Operator(daemon, config.limits, listening.sockets["control"], upgrade)
    watchdog = asyncio.create_task(_watchdog(notifier, period))
    try:
        await daemon.start()
        loop.add_signal_handler(signal.SIGHUP, _reload, daemon, reread)
        operator.start()
        await _keep(listening, keeper, state if STORE not in passed else None)
        notifier.ready(f"serving in {config.runtime_dir}")
        if not _core.COMPILED:
            log.warning("the core is not compiled and runs as Python, about five times slower: install gcc, then again")
        if config.single_process or not config.sandbox:
            key = "single_process = true" if config.single_process else "sandbox = false"
            log.warning("no sandbox is between guests and this host (%s): for debugging only", key)
        log.info("evtchnd %s serves in %s", version(), config.runtime_dir)
        await told.wait()
        notifier.stopping()
        log.info("stopping")
    finally:
        await operator.close()
        await daemon.stop()
        watchdog.cancel()
        with suppress(asyncio.CancelledError):
            await watchdog
        listening.close(keep=bool(notifier))


def _reload(daemon: Daemon, reread: Callable[[], Config]) -> None:
    try:
        daemon.reload(reread())
    except ConfigError as exc:
        for line in exc.faults:
            log.error("%s", line)
        log.error("not reloaded: everything is as before")


async def _keep(listening: Listening, keeper: DescriptorStore, state: Log | None) -> None:
    """Into the descriptor store: sockets there take connections while nobody is here. Those of units are anyway.

    `state`: XenStore's log, unless it came from there.
    """
    fds = {name: listening.sockets[name].fileno() for name in listening.made}
    try:
        await keeper.keep(fds if state is None else {**fds, STORE: state.fd}, "sockets and XenStore")
    except EvtchndError as exc:
        log.warning("not kept over a restart: %s", exc)


def _most_kept(config: Config) -> int:
    """What the service manager takes: systemd tells since 254."""
    said = os.environ.pop("FDSTORE", "")
    return int(said) if said.isdecimal() else config.limits.stored_descriptors


def _state(fd: int | None, passed: dict[str, list[int]], *, kept: bool) -> Log | None:
    """XenStore's log: from --state-fd, from systemd, or a new one if there is somebody to keep it."""
    if STORE in passed:
        stored, *rest = passed[STORE]
        for each in rest:
            os.close(each)
        if fd is None:
            return Log.adopt(stored)
        os.close(stored)
    if fd is not None:
        try:
            os.set_inheritable(fd, False)
        except OSError as exc:
            raise HostError(f"--state-fd {fd}: {exc.strerror}") from None
        return Log.adopt(fd)
    return Log.create() if kept else None


async def _watchdog(notifier: sdnotify.Notifier, period: float | None) -> None:
    """A task of the loop that serves: when that stands still, the manager hears nothing and starts us again."""
    while period is not None:
        try:
            notifier.watchdog()
        except EvtchndError as exc:
            log.warning("%s", exc)
        await asyncio.sleep(period)


def capabilities() -> dict[str, Any]:
    """What this program can do, for management programs (the form of vhost-user's --print-capabilities)."""
    return {
        "type": "xen-backends",
        "version": version(),
        "features": sorted(_core_features()),
        "devices": ["console", "vbd", "vif"],
        "disk-formats": ["raw"],
        "protocol": {
            "version": protocol.VERSION,
            "max-message": protocol.MAX_MESSAGE,
            "max-fds": protocol.MAX_FDS,
        },
        "operator-interfaces": [NAME],
    }


def _core_features() -> list[str]:
    return ["single-process", "socket-activation", "watchdog", *(["compiled"] if _core.COMPILED else [])]


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="evtchnd",
        description="Serves Xen guests on Linux KVM: event channels, XenStore, PV block and network, consoles.",
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help=f"TOML file, and FILE.d/*.toml ({configuration.DEFAULT_PATH})")
    add("--check-config", action="store_true", help="say what is wrong with it, one line each, and end")
    add(
        "--runtime-dir",
        type=_folder,
        metavar="DIR",
        help=f"where all sockets lie ({configuration.DEFAULT_RUNTIME_DIR})",
    )
    add(
        "--state-fd",
        type=int,
        metavar="N",
        help="a memfd, empty or of an earlier run, that holds XenStore over a restart; systemd keeps one by itself",
    )
    add("--check-state", metavar="JSON", help=argparse.SUPPRESS)  # what evtchnctl upgrade asks: descriptors by name
    add(
        "--keep",
        action="store_true",
        help="hold what has to survive it, and start it whenever it ends: for hosts without systemd",
    )
    add("--single-process", action="store_true", help="no worker processes: for debugging")
    add("--log-level", choices=("debug", "info", "warning", "error"))
    add("--log-format", choices=("auto", "text", "json", "journal"))
    add("--print-capabilities", action="store_true", help="as JSON, and end")
    add("--version", action="version", version=version())
    return parser.parse_args(argv)


def _folder(text: str) -> Path:
    if not text:
        raise argparse.ArgumentTypeError("an empty name")  # an unset variable; not the folder of the system's daemon
    return Path(text)


def _config(args: argparse.Namespace) -> Config:
    config = configuration.load(args.config)
    said = {
        "runtime_dir": args.runtime_dir and str(args.runtime_dir.absolute()),
        "log_level": args.log_level,
        "log_format": args.log_format,
        "single_process": args.single_process,
    }
    return configuration.replace(config, **{key: value for key, value in said.items() if value})


if __name__ == "__main__":
    sys.exit(main())
