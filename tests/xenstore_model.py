"""A plain model of the store: one dict, no sharing, no indices. What store.py answers is compared with it."""

from __future__ import annotations

from dataclasses import dataclass, field

from evtchnd.xenstore.wire import PERM_ALL, PERM_OWNER, PERM_READ, PERM_WRITE, Op

Perms = tuple[tuple[int, int], ...]
Reply = tuple[str, object]


@dataclass
class Model:
    nodes: dict[str, tuple[bytes, Perms]] = field(default_factory=lambda: {"/": (b"", ((0, 0),))})
    # Who stands in for whom: shared by a transaction's model with the public one
    targets: dict[int, int] = field(default_factory=dict)
    limit: int = 1000

    def copy(self) -> Model:
        return Model(dict(self.nodes), self.targets, self.limit)

    def rights(self, who: int, path: str) -> int:
        perms = self.nodes[path][1]
        selves = (who, self.targets.get(who))
        if who == 0 or perms[0][0] in selves:
            return PERM_ALL
        return next((mask for domid, mask in perms[1:] if domid in selves), perms[0][1])

    def owned(self, who: int) -> int:
        return sum(perms[0][0] == who for _, perms in self.nodes.values())

    def nearest(self, path: str) -> str:
        while path not in self.nodes:
            path = path.rpartition("/")[0] or "/"
        return path

    def children(self, path: str) -> list[str]:
        prefix = path.rstrip("/") + "/"
        return [
            name[len(prefix) :] for name in self.nodes if name.startswith(prefix) and "/" not in name[len(prefix) :]
        ]

    def below(self, path: str) -> list[str]:
        return [name for name in self.nodes if name == path or name.startswith(path + "/")]

    def release(self, who: int) -> None:
        """The domain is gone, and nothing names it any more."""
        for name in self.below(f"/local/domain/{who}"):
            del self.nodes[name]
        for path in sorted(self.nodes):
            if path not in self.nodes:
                continue
            value, perms = self.nodes[path]
            if perms[0][0] == who and path != "/":
                for name in self.below(path):
                    del self.nodes[name]
            else:
                first = (0, 0) if perms[0][0] == who else perms[0]
                self.nodes[path] = value, (first, *[entry for entry in perms[1:] if entry[0] != who])
        for domid in [domid for domid, target in self.targets.items() if who in (domid, target)]:
            del self.targets[domid]

    def apply(self, who: int, op: Op, path: str, arg: object = None, *, elsewhere: int = 0) -> Reply:
        """(error name or "OK", result); `elsewhere`: nodes that count for the quota and are not seen here"""
        want = {Op.READ: PERM_READ, Op.DIRECTORY: PERM_READ, Op.GET_PERMS: PERM_READ}.get(op, PERM_WRITE)
        if op == Op.SET_PERMS:
            want |= PERM_OWNER
        if path in self.nodes:
            if self.rights(who, path) & want != want:
                return "EACCES", None
        else:
            if not self.rights(who, self.nearest(path)) & want:
                return "EACCES", None
            if op in (Op.READ, Op.DIRECTORY, Op.GET_PERMS, Op.SET_PERMS):
                return "ENOENT", None
        if op in (Op.WRITE, Op.MKDIR) and who != 0 and path not in self.nodes:
            nearest = self.nearest(path)
            missing = path.count("/") - (0 if nearest == "/" else nearest.count("/"))
            if self.owned(who) + elsewhere + missing > self.limit:
                return "ENOSPC", None
        match op:
            case Op.READ:
                return "OK", self.nodes[path][0]
            case Op.DIRECTORY:
                return "OK", sorted(name for name in self.children(path) if name)
            case Op.GET_PERMS:
                return "OK", self.nodes[path][1]
            case Op.SET_PERMS:
                assert isinstance(arg, tuple)
                if who != 0 and arg[0][0] != self.nodes[path][1][0][0]:
                    return "EPERM", None
                self.nodes[path] = (self.nodes[path][0], arg)
            case Op.WRITE:
                assert isinstance(arg, bytes)
                self.create(who, path)
                self.nodes[path] = (arg, self.nodes[path][1])
            case Op.MKDIR:
                self.create(who, path)
            case Op.RM:
                if path not in self.nodes:
                    if (path.rpartition("/")[0] or "/") not in self.nodes:
                        return "ENOENT", None
                elif path == "/":
                    return "EINVAL", None
                else:
                    for name in self.below(path):
                        del self.nodes[name]
            case _:
                raise ValueError(op)
        return "OK", None

    def create(self, who: int, path: str) -> None:
        if path in self.nodes:
            return
        perms = self.nodes[self.nearest(path)][1]
        if who != 0:
            perms = ((who, perms[0][1]), *perms[1:])
        parts = path.split("/")[1:]
        for count in range(1, len(parts) + 1):
            self.nodes.setdefault("/" + "/".join(parts[:count]), (b"", perms))
