"""What control plane and worker say to each other: msgpack, one tagged struct a SEQPACKET message.

| to the worker | descriptors                    | answer                                  |
|---------------|--------------------------------|-----------------------------------------|
| Setup         | XenStore socket                | Done                                    |
| Memory        | one for each `fds` index       | Done (errno, reason: nothing changed)   |
| Attach        | disk, journal                  | Done, after a Keep where it has io_uring |
| AttachConsole | pty, log, old log (-1: left out) | Done                                  |
| AttachVif     | answers, then one TAP queue each of `vif.queues` | Done                  |
| Taps          | one TAP queue each of `vif.queues` | Done                                |
| ChangeVif     |                                | Done, when it holds                     |
| Client        | a client's socket              | Done                                    |
| Capture       | a reader's socket              | Done                                    |
| Detach        |                                | Done, when the backend has ended        |
| Resize        |                                | Done, when the guest has been told      |
| Bound         | kick, notify of each port      |                                         |
| Count         |                                | Counted                                 |
| End           |                                |                                         |

| to the control plane | descriptors | answer                                                   |
|----------------------|-------------|----------------------------------------------------------|
| Bind                 |             | Bound                                                    |
| Unbind               |             |                                                          |
| Connected            |             | Done, when the next control plane would know it, too     |
| Keep                 |             | Done, when the control plane has its copy                |
| Failed               |             | a disk's flush has failed, for that reason               |
| Ended                |             | (reason "" : closed in order; else off, for that reason) |

A `devid` here is the device's key: a disk's number, `console_key` of a console's, `vif_key` of a vif's (device.py).
`id` is the asker's; an answer repeats it. The end of file is the worker's order to end, and the control plane's sign
that it has. After End it ends in order; without, its control plane has died, and it ends at once: the next one's worker
goes on from the journals, and every millisecond that a hundred old workers take is one that guests wait.
"""

from __future__ import annotations

from typing import Any

import msgspec

from evtchnd.control.config import Console, Poll, Vbd
from evtchnd.errors import HostError

DEFECT = 70
"""Exit status of a worker that ends by a defect (sysexits.h: EX_SOFTWARE)."""


class Message(msgspec.Struct, tag=True, array_like=True):
    """One of the messages below."""


class Setup(Message):
    """First message: whose worker this is, and what it may spend."""

    id: int
    domid: int
    poll: Poll
    vbd: Vbd
    drain_s: float
    console: Console = msgspec.field(default_factory=Console)


class Slot(msgspec.Struct, array_like=True):
    """One slot of guest memory; `fd` counts the descriptors of its message."""

    slot: int
    fd: int
    gfn: int
    pages: int
    offset: int


class Frame(msgspec.Struct, array_like=True):
    """One frame of the grant table."""

    index: int
    fd: int
    offset: int


class Memory(Message):
    """A change of slots and grant frames: first what goes, then what comes, without a turn of the loop in between."""

    id: int
    slots_gone: list[int]
    slots: list[Slot]
    frames_gone: list[int]
    frames: list[Frame]


class Attach(Message):
    """A disk; `connected`: what an earlier worker reported for a ring that is live; `vbd`: what its guest was offered
    then, where that is not what the domain's Setup says."""

    id: int
    kind: str
    devid: int
    readonly: bool
    cdrom: bool
    direct: bool
    connected: dict[str, Any] | None
    sectors: int = 0
    sector_size: int = 0
    vbd: Vbd | None = None
    holes: tuple[int, int] | None = None
    failed: str = ""


class AttachConsole(Message):
    """A console. `page`: port and guest frame of the primary one; `pty`, `logs`: whether their descriptors came."""

    id: int
    devid: int
    number: int
    page: tuple[int, int] | None
    pty: bool
    logs: bool
    connected: dict[str, Any] | None


class Vif(msgspec.Struct, array_like=True):
    """A network interface, as its host side is.

    mac       "00:16:3e:xx:xx:xx", the guest's
    queues    queues of the TAP, a descriptor each (IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE; vnet header of 12
              bytes): the most that the frontend may ask for
    name      of the TAP, for log lines
    mtu       payload octets of a frame
    rate      what the guest may send: (bytes, microseconds): so many bytes in so long; (0, 0): no limit
    carrier   False: an operator took the link down
    hash      the control ring (Toeplitz hash) is offered
    stall_s   a guest that offers no receive slot for so long while packets wait loses its carrier; 0: never
    drain_s   a packet that waits for receive slots is dropped after so long
    """

    mac: str
    queues: int
    name: str = ""
    mtu: int = 1500
    rate: tuple[int, int] = (0, 0)
    carrier: bool = True
    hash: bool = True
    stall_s: float = 60.0
    drain_s: float = 10.0


class AttachVif(Message):
    """A network interface; `number`: its devid."""

    id: int
    devid: int
    number: int
    vif: Vif
    connected: dict[str, Any] | None


class Taps(Message):
    """The TAP is another one (it was deleted and made again): new descriptors, as many as before."""

    id: int
    devid: int


class ChangeVif(Message):
    """Changes of a vif that is served; None: as it was."""

    id: int
    devid: int
    mtu: int | None = None
    rate: tuple[int, int] | None = None
    carrier: bool | None = None


class Client(Message):
    """Somebody who reads a console and types at it: a stream socket, and what is sent to it first."""

    id: int
    devid: int
    greeting: bytes


class Capture(Message):
    """Somebody who wants copies of a vif's frames: a stream socket, and what is sent to it first, before pcapng.

    snap    bytes of a frame at most, 0: as many as it has | frames: after so many it ends, 0: never
    """

    id: int
    devid: int
    greeting: bytes
    snap: int
    frames: int


class Detach(Message):
    """The device's backend is cancelled and its descriptors are closed."""

    id: int
    devid: int


class End(Message):
    """The end of file that comes next is an order: drain, then end."""


class Resize(Message):
    """A disk has so many sectors of 512 bytes now."""

    id: int
    devid: int
    sectors: int


class Bind(Message):
    """A device asks for its guest's ports."""

    id: int
    devid: int
    ports: list[int]


class Bound(Message):
    """The answer: two descriptors a port, or a reason."""

    id: int
    reason: str = ""


class Unbind(Message):
    """A device gives ports back."""

    devid: int
    ports: list[int]


class Connected(Message):
    """What a device's live ring is, for the next worker; None: there is none."""

    devid: int
    params: dict[str, Any] | None
    id: int = 0


class Keep(Message):
    """Descriptor `number` of the worker is a device's io_uring, not used yet: what it will have in flight outlives the
    worker. The control plane takes a copy (SCM_RIGHTS refuses to carry io_urings)."""

    id: int
    devid: int
    number: int


class Failed(Message):
    """A disk's flush has failed: no later one may succeed, whoever serves it."""

    devid: int
    reason: str


class Ended(Message):
    """A device's backend has ended by itself."""

    devid: int
    reason: str


class Count(Message):
    """Asks for every device's counters."""

    id: int


class Counted(Message):
    """Counters by device number; 0 holds the worker's own."""

    id: int
    counters: dict[int, dict[str, int]]


class Done(Message):
    """A request is carried out, or refused: errno is not 0 then."""

    id: int
    errno: int = 0
    reason: str = ""


AnyMessage = (
    Setup
    | Memory
    | Attach
    | AttachConsole
    | AttachVif
    | Taps
    | ChangeVif
    | Client
    | Capture
    | Detach
    | End
    | Resize
    | Bind
    | Bound
    | Unbind
    | Connected
    | Keep
    | Failed
    | Ended
    | Count
    | Counted
    | Done
)

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


def pack(message: AnyMessage) -> bytes:
    """The message's bytes."""
    return _encoder.encode(message)


def unpack(data: bytes) -> AnyMessage:
    """HostError for what is none of these messages: the other process is not of this version."""
    try:
        message: AnyMessage = _decoder.decode(data)
    except msgspec.MsgspecError as exc:
        raise HostError(f"a message between control plane and worker cannot be read: {exc}") from None
    return message
