"""The persistent map and tree beside plain dicts; older roots never change."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from evtchnd.xenstore.tree import PMap, Transaction, Tree
from scale import scaled

PERMS = ((0, 0),)
keys = st.integers(0, 400).map(lambda n: b"%d" % n)


@given(st.lists(st.tuples(st.booleans(), keys, st.integers()), max_size=600))
def test_map_is_a_dict_and_old_ones_stay(steps: list[tuple[bool, bytes, int]]) -> None:
    now: PMap[int] = PMap()
    model: dict[bytes, int] = {}
    kept: list[tuple[PMap[int], dict[bytes, int]]] = []
    for number, (put, key, value) in enumerate(steps):
        if number % 50 == 0:
            kept.append((now, dict(model)))
        if put:
            now, model[key] = now.put(key, value), value
        else:
            now = now.remove(key)
            model.pop(key, None)
        assert len(now) == len(model)
        assert now.get(key) == model.get(key)
    for old, then in [*kept, (now, model)]:
        assert dict(old.items()) == then


def test_map_grows_and_shrinks() -> None:
    count = scaled(200_000, least=5000)
    now: PMap[int] = PMap()
    for number in range(count):
        now = now.put(b"%d" % number, number)
    assert all(now.get(b"%d" % number) == number for number in range(count))
    full = now
    for number in range(count):
        now = now.remove(b"%d" % number)
    assert (len(now), list(now.items()), len(full)) == (0, [], count)


@given(st.lists(st.tuples(st.booleans(), keys, st.integers()), max_size=900), st.integers(0, 100))
def test_a_map_changed_in_place_is_a_dict(steps: list[tuple[bool, bytes, int]], copied: int) -> None:
    now: PMap[int] = PMap()
    model: dict[bytes, int] = {}
    for number, (put, key, value) in enumerate(steps):
        if number % 101 == copied:
            # as when a transaction was open for a while
            now = now.put(b"other", value)
            model[b"other"] = value
        assert now.replace(key, value if put else None) == model.get(key)
        if put:
            model[key] = value
        else:
            model.pop(key, None)
        assert len(now) == len(model)
        assert now.get(key) == model.get(key)
    assert dict(now.items()) == model


def test_map_grows_and_shrinks_in_place() -> None:
    count = scaled(200_000, least=5000)
    now: PMap[int] = PMap()
    for number in range(count):
        assert now.replace(b"%d" % number, number) is None
    assert all(now.get(b"%d" % number) == number for number in range(count))
    # its leaves are short: a copy of the way to one is
    path = now._root
    while type(path) is list:
        assert len(path) == 32
        path = path[0]
    assert len(path) <= 32
    for number in range(count):
        assert now.replace(b"%d" % number, None) == number
    assert (len(now), list(now.items()), now._root) == (0, [], {})


def make(*paths: bytes) -> Tree:
    tree = Tree.empty(PERMS, ())
    for generation, path in enumerate(paths, 1):
        tree = tree.create(path, b"", PERMS, generation)
    return tree


def test_children_in_the_order_of_their_creation() -> None:
    names = [b"%d" % (n * 7919 % 1000) for n in range(1000)]
    tree = make(*[b"/" + name for name in names])
    root = tree.get(b"/")
    assert root is not None
    assert root.names() == names


def test_walk_is_deep_and_parents_come_first() -> None:
    paths = [b"/a" * depth for depth in range(1, 1500)]
    assert [path for path, _ in make(*paths).walk()] == [b"/", *paths]


def test_a_removed_tree_leaves_nothing() -> None:
    tree = make(b"/a", b"/a/b", b"/a/b/c", b"/d")
    view = Transaction(tree, record=False)
    view.remove(b"/a", 9)
    assert [path for path, _ in view.tree.walk()] == [b"/", b"/d"]
    assert len(view.tree) == 2
    assert view.events == {b"/a/b/c": False, b"/a/b": False, b"/a": True}
    assert len(tree) == 5


def test_conflicts_are_by_path_and_part() -> None:
    base = make(b"/a", b"/b", b"/a/x")
    view = Transaction(base, record=True)
    view.get(b"/a", 1)  # its value
    assert not view.conflict(base.update(b"/b", b"1", PERMS, 9))
    assert not view.conflict(base.create(b"/a/y", b"1", PERMS, 9))
    assert view.conflict(base.update(b"/a", b"1", PERMS, 9))
    assert view.conflict(base.drop(b"/a/x", 8).drop(b"/a", 9))
    view.get(b"/a", 4)  # its children
    assert view.conflict(base.create(b"/a/y", b"1", PERMS, 9))
    missing = Transaction(base, record=True)
    missing.get(b"/c", 1)
    assert missing.conflict(base.create(b"/c", b"", PERMS, 9))


def test_a_commit_beside_others_changes_keeps_both() -> None:
    base = make(b"/a", b"/a/old")
    view = Transaction(base, record=True)
    view.create(b"/a/mine", b"1", PERMS, 10)
    view.create(b"/a/mine/below", b"2", PERMS, 11)
    view.remove(b"/a/old", 12)
    view.create(b"/a/old", b"again", PERMS, 13)
    now = base.create(b"/a/theirs", b"3", PERMS, 14)
    merged = view.merged(now)
    assert {path: node.value for path, node in merged.walk()} == {
        b"/": b"",
        b"/a": b"",
        b"/a/old": b"again",
        b"/a/theirs": b"3",
        b"/a/mine": b"1",
        b"/a/mine/below": b"2",
    }
    assert len(merged) == 6
