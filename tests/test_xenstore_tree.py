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
