"""Requests about domains: what a toolstack asks, of domain 0 only but for two of them."""

from __future__ import annotations

from dataclasses import replace

from ..abi import DOMID_FIRST_RESERVED, DOMID_SELF
from . import wire
from .quota import NAMES, QUOTA_MAX, Quotas
from .request import OK, Request
from .store import XenStore
from .wire import XenStoreError

# docs/misc/xenstore.txt has this one, the C server the longer one
_ALIASES = {"permissions": "node-permissions"}


def _domid(text: bytes) -> int:
    return wire.number(text, 0xFFFF)


def _known(store: XenStore, text: bytes) -> int:
    domid = _domid(text)
    if domid == 0:
        raise XenStoreError("EINVAL")
    if not store.exists(domid):
        raise XenStoreError("ENOENT")
    return domid


def introduce(request: Request) -> bytes:
    """A guest's page comes from its VMM; a tool can only tell again of a domain that is there, as on resume: its
    ring starts anew."""
    texts = wire.strings(request.payload)
    if len(texts) < 3:
        raise XenStoreError("EINVAL")
    domid = _domid(texts[0])
    if wire.number(texts[2], 0x7FFFFFFF) == 0:
        raise XenStoreError("EINVAL", "port 0")
    if domid == 0 or not request.store.exists(domid):
        raise XenStoreError("EINVAL", "a domain's VMM introduces it")
    request.store.reintroduce(domid)
    return OK


def release(request: Request) -> bytes:
    request.store.release(_known(request.store, wire.one_string(request.payload)))
    return OK


def resume(request: Request) -> bytes:
    """The next shutdown of the domain counts again. Here a domain that has ended is released at once: nothing to do."""
    _known(request.store, wire.one_string(request.payload))
    return OK


def get_domain_path(request: Request) -> bytes:
    return b"/local/domain/%d\0" % _domid(wire.one_string(request.payload))


def is_domain_introduced(request: Request) -> bytes:
    domid = _domid(wire.one_string(request.payload))
    return b"T\0" if domid == DOMID_SELF or request.store.exists(domid) else b"F\0"


def set_target(request: Request) -> bytes:
    texts = wire.strings(request.payload)
    if len(texts) < 2:
        raise XenStoreError("EINVAL")
    domid, target = (_known(request.store, text) for text in texts[:2])
    request.store.domains[domid].target = target
    request.store.changed(request.store.domains[domid])
    return OK


# ---- features and quotas: also of a domain that is still to come


def _possible(text: bytes) -> int:
    domid = _domid(text)
    if domid >= DOMID_FIRST_RESERVED:
        raise XenStoreError("ENOENT", "no domain can have this number")
    return domid


def get_feature(request: Request) -> bytes:
    """[domid] -> the bits that its ring offers"""
    store, conn = request.store, request.conn
    # The empty string is what stands for no parameter at all
    texts = [text for text in wire.strings(request.payload) if text]
    if not texts:
        return b"%d\0" % conn.domain.features
    if not conn.privileged or conn.confine is not None:
        raise XenStoreError("EACCES", "for domain 0's tools")
    if len(texts) > 1:
        raise XenStoreError("EINVAL")
    domain = store.domains.get(_possible(texts[0]))
    return b"%d\0" % (wire.FEATURES if domain is None else domain.features)


def set_feature(request: Request) -> bytes:
    """domid, bits: before it is introduced"""
    store = request.store
    texts = wire.strings(request.payload)
    if len(texts) != 2:
        raise XenStoreError("EINVAL")
    domid, features = _possible(texts[0]), wire.number(texts[1], 0xFFFFFFFF)
    if store.exists(domid):
        raise XenStoreError("EBUSY", "the domain is introduced")
    if features & ~wire.FEATURES:
        raise XenStoreError("EINVAL", "a feature that is not known")
    domain = store.domain(domid)
    domain.features, domain.configured = features, True
    store.changed(domain)
    return OK


def quota_of(text: bytes) -> str:
    """The C server's name of a quota. EINVAL if there is none."""
    name = wire.decode(text)
    name = _ALIASES.get(name, name)
    if name not in NAMES:
        raise XenStoreError("EINVAL", "no such quota")
    return name


def value_of(quotas: Quotas, name: str) -> int:
    """The limit of that name."""
    value: int = getattr(quotas, NAMES[name][0])
    return value


def changed(quotas: Quotas, name: str, value: int) -> Quotas:
    """`quotas` with another limit."""
    return replace(quotas, **{NAMES[name][0]: value})


def _quotas(store: XenStore, domid: int | None) -> Quotas:
    domain = None if domid is None else store.domains.get(domid)
    return store.quotas if domain is None else domain.quotas


def get_quota(request: Request) -> bytes:
    """[[domid] quota] -> its value, or the names of all"""
    texts = [text for text in wire.strings(request.payload) if text]
    if len(texts) > 2:
        raise XenStoreError("EINVAL")
    if not texts:
        return " ".join(NAMES).encode() + b"\0"
    domid = _possible(texts[0]) if len(texts) == 2 else None
    return b"%d\0" % value_of(_quotas(request.store, domid), quota_of(texts[-1]))


def set_quota(request: Request) -> bytes:
    """[domid] quota value: at once for that domain, else for those to come; 0 = not checked"""
    texts = wire.strings(request.payload)
    if len(texts) not in (2, 3):
        raise XenStoreError("EINVAL")
    store = request.store
    domid = _possible(texts[0]) if len(texts) == 3 else None
    name, value = quota_of(texts[-2]), wire.number(texts[-1], QUOTA_MAX)
    store.set_quotas(domid, changed(_quotas(store, domid), name, value))
    return OK
