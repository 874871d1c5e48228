"""Byte streams in one shared page: the XenStore ring (io/xs_wire.h) and the console (io/console.h).

Two rings of bytes, one each way, with free-running 32-bit indices. In both layouts *cons* lies before *prod*. There are
no event indices: who moved an index notifies, and looks again after that (the other side signals a request only if the
ring looked empty). `read` and `write` do what fits and never wait.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from evtchnd._core.words import Mem, full_fence
from evtchnd.errors import GuestError

MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class ByteRing:
    """One direction: offsets in the page of the data and of both indices; `size` is a power of two."""

    data: int
    size: int
    cons: int
    prod: int


@dataclass(frozen=True)
class StreamLayout:
    """Both directions of one page."""

    name: str
    to_back: ByteRing
    to_front: ByteRing


# struct xenstore_domain_interface: req[1024] rsp[1024] req_cons req_prod rsp_cons rsp_prod features connection error
XENSTORE = StreamLayout("xenstore ring", ByteRing(0, 1024, 2048, 2052), ByteRing(1024, 1024, 2056, 2060))
XENSTORE_FEATURES, XENSTORE_CONNECTION, XENSTORE_ERROR = 2064, 2068, 2072

# struct xencons_interface: in[1024] out[2048] in_cons in_prod out_cons out_prod connection; in is to the guest
CONSOLE = StreamLayout("console ring", ByteRing(1024, 2048, 3080, 3084), ByteRing(0, 1024, 3072, 3076))
CONSOLE_CONNECTION = 3088  # uint8_t, since Xen 4.21: who waits for the other value does not write into `out`
CONSOLE_CONNECTED, CONSOLE_DISCONNECTED = 0, 1


class ByteStream:
    """One side of such a page. `view`: 4096 writable bytes.

    This side's two indices are kept privately and only written to the page: the guest may scribble on them without
    effect. GuestError where the other side's index is impossible: that stream is dead.
    """

    def __init__(self, view: Any, layout: StreamLayout, side: Literal["back", "front"] = "back") -> None:
        self.layout = layout
        self._mem = Mem(view)
        self._in, self._out = layout.to_back, layout.to_front
        if side == "front":
            self._in, self._out = self._out, self._in
        self._cons = self._mem.load(self._in.cons)
        self._prod = self._mem.load(self._out.prod)

    def available(self) -> int:
        """Bytes that can be read."""
        prod = self._mem.load(self._in.prod)
        count = (prod - self._cons) & MASK
        if count > self._in.size:
            raise GuestError(
                f"{self.layout.name}: producer {prod:#x} is not within {self._in.size} of consumer {self._cons:#x}"
            )
        return count

    def room(self) -> int:
        """Bytes that can be written."""
        cons = self._mem.load(self._out.cons)
        count = (self._prod - cons) & MASK
        if count > self._out.size:
            raise GuestError(
                f"{self.layout.name}: consumer {cons:#x} is not within {self._out.size} of producer {self._prod:#x}"
            )
        return self._out.size - count

    def read(self, most: int) -> bytes:
        """A copy of at most `most` bytes, which are gone from the ring then. The caller notifies if there were any."""
        data = self.peek(most)
        if data:
            self.consume(len(data))
        return data

    @property
    def cons(self) -> int:
        """This side's position in what it reads; 32 bits, free-running."""
        return self._cons

    @property
    def prod(self) -> int:
        """This side's position in what it writes."""
        return self._prod

    def peek(self, most: int) -> bytes:
        """A copy of at most `most` bytes, which stay in the ring."""
        n = min(self.available(), most)
        if n <= 0:
            return b""
        start = self._cons & (self._in.size - 1)
        first = min(n, self._in.size - start)
        data = self._mem.read(self._in.data + start, first)
        if first < n:
            data += self._mem.read(self._in.data, n - first)
        return data

    def consume(self, n: int) -> None:
        """`n` bytes that were peeked at are gone from the ring."""
        full_fence()  # the copy is complete before the other side may write there again
        self._cons = (self._cons + n) & MASK
        self._mem.store(self._in.cons, self._cons)
        full_fence()  # and a look at prod that follows is later than this

    def resume(self, cons: int) -> None:
        """Reads on from position `cons`, whatever the page says."""
        self._cons = cons & MASK
        self._mem.store(self._in.cons, self._cons)

    def write(self, data: bytes | memoryview) -> int:
        """Copy in as much as fits; -> how much. The caller notifies if it was any."""
        n = min(self.room(), len(data))
        if n == 0:
            return 0
        full_fence()  # room was read before its bytes are overwritten
        start = self._prod & (self._out.size - 1)
        first = min(n, self._out.size - start)
        self._mem.write(self._out.data + start, bytes(data[:first]))
        if first < n:
            self._mem.write(self._out.data, bytes(data[first:n]))
        self._prod = (self._prod + n) & MASK
        self._mem.store(self._out.prod, self._prod)
        full_fence()
        return n

    def attach(self) -> None:
        """Takes this side's indices from the page again: a guest that starts over (kexec, a reboot on the same page)
        has set them. One that lies about them loses bytes of its own."""
        self._cons = self._mem.load(self._in.cons)
        self._prod = self._mem.load(self._out.prod)

    def reset(self) -> None:
        """Both directions empty, all four indices 0 (a reconnect that both sides agreed upon)."""
        for ring in (self._in, self._out):
            self._mem.store(ring.cons, 0)
            self._mem.store(ring.prod, 0)
        self._cons = self._prod = 0

    def close(self) -> None:
        """Let go of the page's buffer; idempotent."""
        self._mem.close()
