"""The nodes that `evtchnd-bench xenstore` works on; xenstoreload.c has the same paths.

/bench/<k / 1000>/<k / 10 % 100>/<k % 10>     value of 12 bytes, as devices' directories are: ten in each
/siblings/10/<k>, /siblings/10000/<k>         neighbours in one directory
/thousand/<k>                                 what is listed
/made, /watched/this
/local/domain/<n>/data/<k>                    ten nodes of each of GUESTS guests, their own
"""

from __future__ import annotations

from evtchnd.xenstore import operations
from evtchnd.xenstore.store import XenStore
from evtchnd.xenstore.wire import Op

VALUE = b"000000000000"
GUESTS = 256


def fill(store: XenStore, nodes: int) -> None:
    """By requests of a client in this process; a small store gets no /siblings."""
    conn = store.connect(0)

    def write(path: bytes) -> None:
        operations.handle(store, conn, Op.WRITE, 0, 0, path + b"\0" + VALUE)
        conn.clear()

    for k in range(nodes):
        write(b"/bench/%d/%d/%d" % (k // 1000, k // 10 % 100, k % 10))
    if nodes >= 10_000:
        for siblings in (10, 10_000):
            for k in range(siblings):
                write(b"/siblings/%d/%d" % (siblings, k))
    for k in range(1000):
        write(b"/thousand/%03d" % k)
    for domid in range(1, GUESTS + 1):
        store.introduce(domid)
        home = b"/local/domain/%d" % domid
        for k in range(10):
            write(b"%b/data/%d" % (home, k))
        for path in (home, home + b"/data", *[b"%b/data/%d" % (home, k) for k in range(10)]):
            operations.handle(store, conn, Op.SET_PERMS, 0, 0, b"%b\0n%d\0" % (path, domid))
            conn.clear()
    write(b"/made")
    write(b"/watched/this")
    store.disconnect(conn)
