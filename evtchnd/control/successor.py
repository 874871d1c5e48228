"""Live upgrade: the program that is installed now is asked whether it can go on with all that is kept; then it does.

`evtchnctl upgrade` -> this process starts its own command line again, with --check-state and copies of every kept
descriptor; that one reads the state of each domain, the journals' heads and XenStore's log, changes nothing, and says
what it cannot read. Only where that is nothing does this process end, in order, and the service manager starts the
other one.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Mapping, Sequence

from evtchnd.control.kept import left_of
from evtchnd.errors import HostError, OperatorError
from evtchnd.xenstore import restore
from evtchnd.xenstore.log import Log
from evtchnd.xenstore.migration import MigrationError

# Imports, and a log of 512 domains read twice over on a busy host.
_ANSWER_S = 60.0


async def ask(held: Mapping[str, int], arguments: Sequence[str]) -> None:
    """Asks the program that `arguments` (of this process, without the interpreter) start. OperatorError: it says no."""
    copies = {name: os.dup(fd) for name, fd in held.items()}
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *arguments,
            "--check-state",
            json.dumps(copies),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            pass_fds=list(copies.values()),
        )
    except OSError as exc:
        raise OperatorError(f"the program cannot be started: {exc.strerror}: this one goes on") from None
    finally:
        for fd in copies.values():
            os.close(fd)
    try:
        async with asyncio.timeout(_ANSWER_S):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise OperatorError(f"the program has not answered in {_ANSWER_S:g} s: this one goes on") from None
    if process.returncode:
        lines = said.decode(errors="replace").strip().splitlines() or [f"exit status {process.returncode}"]
        raise OperatorError(f"the program that is installed now cannot go on: {'; '.join(lines[-8:])}: this one does")


def faults(held: Mapping[str, int], log_name: str) -> list[str]:
    """What of the descriptors this program cannot read, a line each. Takes them; nothing in them changes."""
    found = []
    if (fd := held.get(log_name)) is not None:
        try:
            restore.from_log(Log(fd))
        except (HostError, MigrationError) as exc:
            found.append(f"xenstore: {exc}")
    for domid, left in left_of({name: [fd] for name, fd in held.items()}).items():
        if left.reason:
            found.append(f"domain {domid}: {left.reason}")
        elif left.said is not None:
            found += [
                f"domain {domid}: vbd {each.devid}: cannot be read"
                for each in left.said.disks
                if each.devid not in left.disks
            ]
        left.close()
    return found
