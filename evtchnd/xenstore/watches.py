"""Watches, found by path: a watch on another path costs a change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .quota import Connection


class Watch:
    """One watch.

    `strip`: bytes cut from an event's path (a relative watch gets relative events); `depth`: levels below, None = all.
    """

    __slots__ = ("conn", "depth", "path", "strip", "token")

    def __init__(self, conn: Connection, path: bytes, token: bytes, strip: int, depth: int | None) -> None:
        self.conn = conn
        self.path = path
        self.token = token
        self.strip = strip
        self.depth = depth

    def reaches(self, path: bytes) -> bool:
        """Is `path`, which lies at or below the watch's, within its depth?"""
        if self.depth is None:
            return True
        levels = path.count(b"/", 0 if self.path == b"/" else len(self.path))
        return levels <= self.depth if path != self.path else True


class Watches:
    """All watches of the store: `by_path`."""

    def __init__(self) -> None:
        self.by_path: dict[bytes, dict[Watch, None]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.by_path.values()))

    def add(self, watch: Watch) -> None:
        self.by_path.setdefault(watch.path, {})[watch] = None

    def remove(self, watch: Watch) -> None:
        group = self.by_path[watch.path]
        del group[watch]
        if not group:
            del self.by_path[watch.path]

    def exactly(self, path: bytes) -> Iterator[Watch]:
        """Watches of this very path."""
        yield from self.by_path.get(path, ())

    def above(self, path: bytes) -> Iterator[Watch]:
        """Watches of `path` and of every path above it."""
        by_path = self.by_path
        if path != b"/":
            yield from (watch for watch in by_path.get(b"/", ()) if watch.reaches(path))
        at = path.find(b"/", 1)
        while at > 0:
            group = by_path.get(path[:at])
            if group is not None:
                yield from (watch for watch in group if watch.reaches(path))
            at = path.find(b"/", at + 1)
        yield from by_path.get(path, ())
