"""XenStore without I/O: domains, connections, transactions, watches, permissions, quotas."""

from __future__ import annotations


class Quotas:
    """Limits of one domain (defaults: the C server's)."""


class XenStore:
    """The store. See server.py for who drives it."""
