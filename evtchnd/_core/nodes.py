# cython: annotation_typing=False
"""XenStore's nodes and the map that holds them (evtchnd/xenstore/tree.py): what every request comes through.

    PMap -> 32 -> 32 -> ... -> {key: value} of at most 32      (a map of up to 32 is that one dict)

It goes by Python's keyed hash: a guest cannot aim at a bucket. Keys are bytes; None is no value.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Self

try:
    import cython
except ImportError:
    from evtchnd._core import nocython as cython

COMPILED: bool = bool(cython.compiled)

# wire.Perms
Perms = tuple[tuple[int, int], ...]

_FANOUT_BITS = 5
_FANOUT = 1 << _FANOUT_BITS
_MASK = _FANOUT - 1
_LEAF_MAX = 32
# Past this the hash has no bits left: a leaf may grow beyond its size instead.
_SHIFT_MAX = 60


class PMap:
    """A persistent map with bytes as keys; `items()` come in no order."""

    if TYPE_CHECKING:
        _root: Any  # dict of entries, or list of _FANOUT of such
        _count: int
        listed: bytes | None
    elif not cython.compiled:
        __slots__ = ("_count", "_root", "listed")

    def __init__(self, _root: Any = None, _count: int = 0) -> None:
        self._root = {} if _root is None else _root
        self._count = _count
        self.listed: bytes | None = None  # see Node.listing

    def __len__(self) -> int:
        return self._count

    @classmethod
    def of(cls, entries: dict[bytes, Any]) -> Self:
        """All of `entries`, which it takes, at once."""
        return cls(_built(entries, 0), len(entries))

    def get(self, key: bytes) -> Any:
        node = self._root
        if type(node) is list:
            bits = hash(key)
            while type(node) is list:
                node = node[bits & _MASK]
                bits >>= _FANOUT_BITS
        return node.get(key)

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def put(self, key: bytes, value: Any) -> PMap:
        """With `key` set to `value` (not None)."""
        return PMap(*self._put(key, value))

    def remove(self, key: bytes) -> PMap:
        """Without `key`; itself if it is not there."""
        if self.get(key) is None:
            return self
        return PMap(*self._remove(key))

    def replace(self, key: bytes, value: Any) -> Any:
        """Sets `key` (None: takes it away) in this map itself, which nobody else may have; -> what was there."""
        leaf = self._root
        branch: Any = None
        bits = hash(key)
        shift = at = 0
        while type(leaf) is list:
            branch = leaf
            at = bits & _MASK
            bits >>= _FANOUT_BITS
            shift += _FANOUT_BITS
            leaf = branch[at]
        was = leaf.get(key)
        if value is not None:
            leaf[key] = value
            if was is None:
                self._count += 1
                if len(leaf) > _LEAF_MAX and shift < _SHIFT_MAX:
                    parts = _split(leaf, shift)
                    if branch is None:
                        self._root = parts
                    else:
                        branch[at] = parts
        elif was is not None:
            del leaf[key]
            self._count -= 1
            if self._count < _LEAF_MAX // 2 and branch is not None:
                self._root = dict(_entries(self._root))
        return was

    def _put(self, key: bytes, value: Any) -> tuple[Any, int]:
        root = self._root
        if type(root) is dict:
            leaf = root.copy()
            leaf[key] = value
            return (leaf if len(leaf) <= _LEAF_MAX else _split(leaf, 0)), len(leaf)
        bits = hash(key)
        shift = 0
        root = branch = root.copy()
        while True:
            at = bits & _MASK
            bits >>= _FANOUT_BITS
            shift += _FANOUT_BITS
            child = branch[at].copy()
            branch[at] = child
            if type(child) is dict:
                break
            branch = child
        before = len(child)
        child[key] = value
        count = self._count + len(child) - before
        if len(child) > _LEAF_MAX and shift < _SHIFT_MAX:
            branch[at] = _split(child, shift)
        return root, count

    def _remove(self, key: bytes) -> tuple[Any, int]:
        # Emptied leaves stay: the map of a store that shrank keeps its levels, 32 small dicts for each
        node = self._root.copy()
        root = node
        bits = hash(key)
        while type(node) is list:
            at = bits & _MASK
            bits >>= _FANOUT_BITS
            child = node[at].copy()
            node[at] = child
            node = child
        del node[key]
        if self._count <= _LEAF_MAX // 2 and type(root) is list:
            root = dict(_entries(root))
        return root, self._count - 1

    def items(self) -> list[tuple[bytes, Any]]:
        return _entries(self._root)

    def lazily(self) -> Iterator[tuple[bytes, Any]]:
        """`items()`, of a leaf at a time: the first of a million come as fast as those of a hundred."""
        pending = [self._root]
        while pending:
            node = pending.pop()
            if type(node) is dict:
                yield from node.items()
            else:
                pending += node


def _split(leaf: dict[bytes, Any], shift: int) -> list[Any]:
    parts: list[dict[bytes, Any]] = [{} for _ in range(_FANOUT)]
    for key, value in leaf.items():
        parts[(hash(key) >> shift) & _MASK][key] = value
    return list(parts)


def _built(leaf: dict[bytes, Any], shift: int) -> Any:
    if len(leaf) <= _LEAF_MAX or shift >= _SHIFT_MAX:
        return leaf
    return [_built(part, shift + _FANOUT_BITS) for part in _split(leaf, shift)]


def _entries(node: Any) -> list[tuple[bytes, Any]]:
    if type(node) is dict:
        return list(node.items())
    found = []
    for child in node:
        found += _entries(child)
    return found


class Node:
    """One node. Never changed; `generation` is the store's count when this form of it was made."""

    if TYPE_CHECKING:
        children: PMap | None
        generation: int
        perms: Perms
        value: bytes
    elif not cython.compiled:
        __slots__ = ("children", "generation", "perms", "value")

    def __init__(self, value: bytes, perms: Perms, children: PMap | None, generation: int) -> None:
        self.value = value
        self.perms = perms
        self.children = children
        self.generation = generation

    @property
    def owner(self) -> int:
        return self.perms[0][0]

    def with_child(self, name: bytes, generation: int) -> Node:
        """It with one more child, the last of them."""
        children = PMap() if self.children is None else self.children
        return Node(self.value, self.perms, children.put(name, generation), generation)

    def without_child(self, name: bytes, generation: int) -> Node:
        """It without that child."""
        children = self.children
        if children is not None:
            children = children.remove(name) if len(children) > 1 or name not in children else None
        return Node(self.value, self.perms, children, generation)

    def names(self) -> list[bytes]:
        """The children's names in the order of their creation: Linux numbers its devices by it."""
        return self.listing().split(b"\0")[:-1]

    def entries(self, ordered: bool) -> Iterator[tuple[bytes, int]]:
        """Names and what they are ordered by."""
        if self.children is None:
            return iter(())
        if not ordered:
            return self.children.lazily()
        found = self.children.items()
        found.sort(key=itemgetter(1))
        return iter(found)

    def listing(self) -> bytes:
        """`names()`, each with a NUL at its end. Kept: a long directory is read in many parts."""
        children = self.children
        if children is None:
            return b""
        found = children.listed
        if found is None:
            found = b"\0".join([*[name for name, _ in self.entries(ordered=True)], b""])
            if len(children) > _LEAF_MAX:
                children.listed = found
        return found
