"""Whose fault it is: the class of an exception says what has to stop.

| raised         | fault of                   | what stops                                  |
|----------------|----------------------------|---------------------------------------------|
| GuestError     | a guest's data             | one device                                  |
| VmmError       | a VMM's message            | one domain's connection                     |
| OperatorError  | a command or a config file | that command, with one line that says why   |
| HostError      | the host's resources       | what asked for the resource                 |
| XenError       | a hypercall's arguments    | nothing: the guest gets the error number    |

Anything else that is raised is a defect of this program.
"""

from __future__ import annotations

import errno as _errno


class EvtchndError(Exception):
    """Base of every error whose one-line text is meant for the operator."""


class GuestError(EvtchndError):
    """A guest's data is wrong: stop that device, touch nobody else."""


class VmmError(EvtchndError):
    """A VMM's message is wrong: refuse it, and end that connection where the stream is lost.

    `errno` (positive) goes into the error reply of the VMM's socket.
    """

    def __init__(self, reason: str, errno: int = _errno.EINVAL) -> None:
        super().__init__(reason)
        self.errno = errno


class OperatorError(EvtchndError):
    """A command or a config file asks for what cannot be done.

    `errno` (positive) is what a VMM is told that asked for the same over its socket.
    """

    def __init__(self, reason: str, errno: int = _errno.EINVAL) -> None:
        super().__init__(reason)
        self.errno = errno


class HostError(EvtchndError):
    """The host refused a resource (descriptors, memory, a file)."""


class XenError(EvtchndError):
    """A hypercall fails with a Xen error number (positive here; a guest sees it negated).

    Xen's numbers are Linux's for every one that is used here (xen/include/public/errno.h).
    """

    def __init__(self, errno: int, reason: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(f"{name}: {reason}" if reason else name)
        self.errno = errno
