"""The store's nodes: immutable, in a persistent map from path to node; a transaction keeps its root.

`tree = tree.update(...)` shares all but some hundred bytes with the one before, so that keeping an old root costs
nothing. Where nobody has kept one, that is most of the time, the public root is changed in place (`Tree.replace`),
which costs a fifth. The map goes by the whole path (Python's keyed hash: a guest cannot aim at a bucket),
so no cost depends on a node's depth, on the number of its siblings or on the size of the store, apart from the depth of
the map: one level more for 32 times as many nodes. A change touches each entry of the dicts and lists that it copies,
and those are cold: so both are short.

    Tree -> 32 -> 32 -> ... -> {path: Node} of at most 32      (a tree or a directory of up to 32 is that one dict)
    Node.children -> the same kind of map, {name: order of creation}
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import itemgetter
from typing import Any, Generic, Self, TypeVar

from . import wire

V = TypeVar("V")

_FANOUT_BITS = 5
_FANOUT = 1 << _FANOUT_BITS
_MASK = _FANOUT - 1
_LEAF_MAX = 32
# Past this the hash has no bits left: a leaf may grow beyond its size instead.
_SHIFT_MAX = 60


class PMap(Generic[V]):
    """A persistent map with bytes as keys; `items()` come in no order."""

    __slots__ = ("_count", "_root", "listed")
    _root: Any  # dict of entries, or list of _FANOUT of such; never changed once it is reachable from a map
    _count: int

    def __init__(self, _root: Any = None, _count: int = 0) -> None:
        self._root = {} if _root is None else _root
        self._count = _count
        self.listed: bytes | None = None  # see Node.listing

    def __len__(self) -> int:
        return self._count

    @classmethod
    def of(cls, entries: dict[bytes, V]) -> Self:
        """All of `entries`, which it takes, at once."""
        return cls(_built(entries, 0), len(entries))

    def get(self, key: bytes) -> V | None:
        node = self._root
        if type(node) is list:
            bits = hash(key)
            while type(node) is list:
                node = node[bits & _MASK]
                bits >>= _FANOUT_BITS
        found: V | None = node.get(key)
        return found

    def __contains__(self, key: bytes) -> bool:
        return self.get(key) is not None

    def put(self, key: bytes, value: V) -> PMap[V]:
        """With `key` set to `value` (not None)."""
        return PMap(*self._put(key, value))

    def remove(self, key: bytes) -> PMap[V]:
        """Without `key`; itself if it is not there."""
        if self.get(key) is None:
            return self
        return PMap(*self._remove(key))

    def replace(self, key: bytes, value: V | None) -> V | None:
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
        was: V | None = leaf.get(key)
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

    def _put(self, key: bytes, value: V) -> tuple[Any, int]:
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

    def items(self) -> list[tuple[bytes, V]]:
        return _entries(self._root)

    def lazily(self) -> Iterator[tuple[bytes, V]]:
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

    __slots__ = ("children", "generation", "perms", "value")

    def __init__(self, value: bytes, perms: wire.Perms, children: PMap[int] | None, generation: int) -> None:
        self.value = value
        self.perms = perms
        self.children = children
        self.generation = generation

    @property
    def owner(self) -> int:
        return self.perms[0][0]

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


class Tree(PMap[Node]):
    """All nodes by path. `/` and the special nodes (`@releaseDomain`) are always there."""

    __slots__ = ()

    @classmethod
    def empty(cls, perms: wire.Perms, specials: tuple[bytes, ...]) -> Tree:
        """A tree of `/` alone."""
        return cls({path: Node(b"", perms, None, 0) for path in (b"/", *specials)}, 1 + len(specials))

    def update(self, path: bytes, value: bytes, perms: wire.Perms, generation: int) -> Tree:
        """With new content in a node that exists; its children stay."""
        node = self.get(path)
        return Tree(*self._put(path, Node(value, perms, None if node is None else node.children, generation)))

    def create(self, path: bytes, value: bytes, perms: wire.Perms, generation: int) -> Tree:
        """With a new node under a parent that exists."""
        above, parent = self.parent_with(path, generation)
        tree = Tree(*self._put(path, Node(value, perms, None, generation)))
        return Tree(*tree._put(above, parent))

    def drop(self, path: bytes, generation: int) -> Tree:
        """Without one node (its children have gone before) and its name in the parent, if that is still there."""
        tree = Tree(*self._remove(path))
        above, parent = tree.parent_without(path, generation)
        return tree if parent is None else Tree(*tree._put(above, parent))

    def parent_with(self, path: bytes, generation: int) -> tuple[bytes, Node]:
        """The parent's path, and the parent as it is when it has the child `path`, a new one."""
        at = path.rfind(b"/")
        above = path[:at] if at > 0 else b"/"
        parent = self.get(above)
        if parent is None:
            raise KeyError(above)
        children = (PMap() if parent.children is None else parent.children).put(path[at + 1 :], generation)
        return above, Node(parent.value, parent.perms, children, generation)

    def parent_without(self, path: bytes, generation: int) -> tuple[bytes, Node | None]:
        """The parent's path, and the parent as it is without that child; None: it is not there, or has none."""
        at = path.rfind(b"/")
        above = path[:at] if at > 0 else b"/"
        parent = self.get(above)
        if parent is None or parent.children is None:
            return above, None
        siblings = parent.children.remove(path[at + 1 :])
        return above, Node(parent.value, parent.perms, siblings if len(siblings) else None, generation)

    def walk(self, path: bytes = b"/") -> Iterator[tuple[bytes, Node]]:
        """A node and all below it, parents first, siblings in the order of their creation."""
        return ((path, node) for path, node, _ in self.places(path))

    def places(self, path: bytes = b"/", *, ordered: bool = True) -> Iterator[tuple[bytes, Node, int]]:
        """`walk`, with each node's place: its siblings' order goes by it (that of `path` itself is 0).

        Without recursion: a guest may nest 1,000 levels. ordered: takes 3 ms for 10,000 siblings at once.
        """
        node = self.get(path)
        if node is None:
            return
        yield path, node, 0
        pending = [(path.rstrip(b"/") + b"/", node.entries(ordered))]
        while pending:
            above, names = pending[-1]
            for name, place in names:
                path = above + name
                node = self.get(path)
                if node is None:
                    continue
                yield path, node, place
                if node.children is not None:
                    pending.append((path + b"/", node.entries(ordered)))
                    break
            else:
                pending.pop()


# What of a node a transaction has relied on
VALUE = 1
PERMS = 2
CHILDREN = 4
ALL = VALUE | PERMS | CHILDREN


class Transaction:
    """A view of the store that only its owner changes.

    `base`      the root it started from
    `tree`      its own root
    `touched`   path -> what of it was relied on; None: not kept (published at once, nothing can come in between)
    `changes`   path -> the node as it was in `base` (None: it was not there); in the order of the first change
    `events`    path -> True: for watches of the path and above it; False: of this path only (below what was removed)
    `last`      generation of the last removal
    `stale`     a path that cannot be committed any more: it names a domain that is gone
    `growth`    domid -> nodes it owns more (or fewer) than in `base`
    `bytes`     what the nodes that it has written cost until its end (quota.node_size, without permissions)
    `holders`   who else has its root, and sees it as it is; 0: the root is changed in place
    `replaced`  (path, node before), in order: what was changed in place
    """

    __slots__ = (
        *("base", "bytes", "changes", "events", "failed", "growth", "holders", "last", "replaced", "stale", "touched"),
        "tree",
    )

    def __init__(self, tree: Tree, *, record: bool) -> None:
        self.base = tree
        self.tree = tree
        self.holders = 1
        self.replaced: list[tuple[bytes, Node | None]] = []
        self.touched: dict[bytes, int] | None = {} if record else None
        self.changes: dict[bytes, Node | None] = {}
        self.events: dict[bytes, bool] = {}
        self.growth: dict[int, int] = {}
        self.bytes = 0
        self.last = 0
        self.stale: bytes | None = None
        self.failed = False

    def touch(self, path: bytes, what: int) -> None:
        """Remember that the owner relies on `path`."""
        if self.touched is not None:
            self.touched[path] = self.touched.get(path, 0) | what

    def get(self, path: bytes, what: int) -> Node | None:
        """The node, noting what the owner will look at."""
        if self.touched is not None:
            self.touched[path] = self.touched.get(path, 0) | what
        return self.tree.get(path)

    def update(self, path: bytes, node: Node, value: bytes, perms: wire.Perms, generation: int) -> None:
        """New content for `node`, which is at `path`."""
        if self.touched is not None:
            self.bytes += len(value) - len(node.value) if path in self.changes else len(path) + len(value)
        self.changes.setdefault(path, node)
        if perms is not node.perms and perms[0][0] != node.owner:
            self._grow(node.owner, -1)
            self._grow(perms[0][0], 1)
        if self.holders:
            self.tree = self.tree.update(path, value, perms, generation)
        else:
            self._replace(path, Node(value, perms, node.children, generation))

    def create(self, path: bytes, value: bytes, perms: wire.Perms, generation: int) -> None:
        """A new node under a parent that exists."""
        if self.touched is not None:
            self.bytes += len(value) if path in self.changes else len(path) + len(value)
        self.changes.setdefault(path, None)
        self._grow(perms[0][0], 1)
        if self.holders:
            self.tree = self.tree.create(path, value, perms, generation)
        else:
            above, parent = self.tree.parent_with(path, generation)
            self._replace(path, Node(value, perms, None, generation))
            self._replace(above, parent)

    def remove(self, path: bytes, generation: int) -> None:
        """A node and all below it; one event for each."""
        self.last = generation
        top = self.tree.get(path)
        doomed = [(path, top)] if top is not None and top.children is None else list(self.tree.walk(path))
        for below, node in reversed(doomed):
            if self.touched is not None:
                self.touch(below, ALL)
                self.bytes += -len(node.value) if below in self.changes else len(below)
            self.changes.setdefault(below, node)
            self._grow(node.owner, -1)
            self.events.setdefault(below, False)
            if not self.holders:
                self._replace(below, None)
            elif below != path:
                # the parent goes, too: no need to unlink
                self.tree = Tree(*self.tree._remove(below))
        if self.holders:
            self.tree = self.tree.drop(path, generation)
        else:
            above, parent = self.tree.parent_without(path, generation)
            if parent is not None:
                self._replace(above, parent)
        self.events[path] = True

    def _replace(self, path: bytes, node: Node | None) -> None:
        self.replaced.append((path, self.tree.replace(path, node)))

    def forget(self) -> None:
        """As if nothing had been changed since `base`."""
        self.tree = self.base
        for path, was in reversed(self.replaced):
            self.tree.replace(path, was)
        self.settled()

    def settled(self) -> None:
        """What was changed is `base` now; what it was is nobody's any more."""
        self.base = self.tree
        self.replaced.clear()
        self.changes, self.events, self.growth = {}, {}, {}

    def fire(self, path: bytes) -> None:
        """An event for watches of `path` and above."""
        self.events[path] = True

    def _grow(self, domid: int, by: int) -> None:
        self.growth[domid] = self.growth.get(domid, 0) + by

    def forget_domain(self, domid: int) -> None:
        """It is gone: what was written for it is not for the next domain of that number."""
        for path in self.changes:
            node = self.tree.get(path)
            if node is not None and any(named == domid for named, _ in node.perms):
                self.stale = path

    def conflict(self, tree: Tree) -> bytes | None:
        """A path that has changed in `tree` and that the owner relied on, by part of a node: a sibling is none."""
        if self.stale is not None or tree is self.base or self.touched is None:
            return self.stale
        for path, what in self.touched.items():
            then, now = self.base.get(path), tree.get(path)
            if then is now:
                continue
            if then is None or now is None:
                return path
            if what & VALUE and then.value != now.value:
                return path
            if what & PERMS and then.perms != now.perms:
                return path
            if what & CHILDREN and then.children is not now.children:
                return path
        return None

    def merged(self, tree: Tree) -> Tree:
        """`tree` with this transaction's changes; `conflict(tree)` is None."""
        if tree is self.base:
            return self.tree
        final = {path: self.tree.get(path) for path in self.changes}
        # By depth, so that parents come before what lies below them; else in the owner's order
        for path in sorted(final, key=lambda p: p.count(b"/")):
            node, now = final[path], tree.get(path)
            if node is None:
                continue
            if now is None:
                tree = tree.create(path, node.value, node.perms, node.generation)
            elif node.value != now.value or node.perms != now.perms:
                tree = tree.update(path, node.value, node.perms, node.generation)
        for path in sorted(final, key=lambda p: -p.count(b"/")):
            if final[path] is None and tree.get(path) is not None:
                tree = tree.drop(path, self.last)
        return tree
