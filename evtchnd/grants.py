"""The guest's grant table, version 1: look up, validate, pin, unpin (grant_table.h).

A pin is Xen's map without a mapping: guest memory is mapped as it is, so that a grant only says which frame, and that
the guest allows it. GTF_reading and GTF_writing in the entry keep the guest from taking the page back meanwhile.
"""

from __future__ import annotations

import errno
import mmap

from evtchnd._core.pins import Pins
from evtchnd._core.words import Mem
from evtchnd.errors import VmmError
from evtchnd.memory import GuestMemory, check_memfd, map_page

# xen-command-line: gnttab_max_frames, Xen's default; 64 frames are 32768 grants, 128 MiB in flight
MAX_FRAMES = 64


class Page:
    """One granted page, pinned until `close()`: a ring's page, a console.

    view: 4096 writable bytes (the guest may change them at any time); gref, gfn: what it is.
    """

    def __init__(self, table: GrantTable, gref: int, gfn: int, *, write: bool) -> None:
        self._table: GrantTable | None = table
        self._write = write
        self.gref = gref
        self.gfn = gfn
        self.view = table.memory.view_at(table.address_of(gref), 4096)

    def close(self) -> None:
        """Release the view and unpin; idempotent. Close what was made from the view (rings, streams) first."""
        if self._table is None:
            return
        self.view.release()
        table, self._table = self._table, None
        table.unpin(self.gref, write=self._write)


class GrantTable(Pins):
    """One domain's table, granted to `backend_domid`; frames come and go while the guest runs.

    pinned: all pins that are held, for leak tests.
    """

    memory: GuestMemory

    def __init__(
        self, memory: GuestMemory, domid: int, *, backend_domid: int = 0, max_frames: int = MAX_FRAMES
    ) -> None:
        super().__init__(memory, domid, backend_domid, max_frames)
        self._mapped: dict[int, mmap.mmap] = {}

    def add_frame(self, index: int, fd: int, offset: int) -> None:
        """Map a page of the table, entries 512*index on. The caller closes `fd`. VmmError, with nothing changed.

        Pins of a frame that was removed meanwhile go on: their unpin clears the flags in the frame that is there then.
        """
        if not 0 <= index < self.max_frames:
            raise VmmError(f"grant frame {index}: the table has at most {self.max_frames} frames")
        if index in self._mapped:
            raise VmmError(f"grant frame {index} is there already", errno.EEXIST)
        check_memfd(fd, offset, 4096, f"grant frame {index}")
        page = map_page(fd, offset, f"grant frame {index}")
        self._mapped[index] = page
        self.set_frame(index, Mem(page))

    def remove_frame(self, index: int) -> None:
        """Unmap a page of the table. Pins through it are kept; there are no new ones. VmmError for an unknown one."""
        if index not in self._mapped:
            raise VmmError(f"grant frame {index} is not there", errno.ENOENT)
        frame = self.frame_at(index)
        self.set_frame(index, None)
        if frame is not None:
            frame.close()
        self._mapped.pop(index).close()

    def pin(self, gref: int, *, write: bool) -> int:
        """Pin a grant for reading, or for writing too; -> gfn. GuestError names the gref and the reason."""
        return self.pin_frame(gref, write)

    def unpin(self, gref: int, *, write: bool) -> None:
        """Undo one `pin` of the same kind. ValueError (our defect) if there is none."""
        self.unpin_frame(gref, write)

    def map(self, gref: int, *, write: bool) -> Page:
        """Pin a page for long and give a view of it. GuestError as `pin`."""
        gfn = self.pin_frame(gref, write)
        return Page(self, gref, gfn, write=write)

    def close(self) -> None:
        """Unmap the table; idempotent. RuntimeError (a defect of the closing order) if pins are left."""
        if self.pinned:
            raise RuntimeError(f"domain {self.domid}: {self.pinned} grants are pinned: close the rings first")
        for index in list(self._mapped):
            self.remove_frame(index)


def refuse_version(version: int) -> None:
    """VmmError unless the guest's grant table has version 1."""
    if version == 2:
        raise VmmError(
            "grant tables of version 2 are not supported: answer GNTTABOP_set_version with ENOSYS, "
            "and the guest uses version 1",
            errno.ENOSYS,
        )
    if version != 1:
        raise VmmError(f"grant table version {version} is unknown")
