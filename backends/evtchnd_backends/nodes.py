"""What a guest has written into its own XenStore nodes, read as what it has to be."""

from __future__ import annotations

from collections.abc import Mapping

from evtchnd.errors import GuestError

_U32 = 1 << 32


def number(nodes: Mapping[str, str], name: str) -> int:
    """A decimal u32: what "%u" prints, nothing else that int() would take (signs, blanks, underscores). GuestError."""
    text = nodes.get(name)
    if text is None:
        raise GuestError(f"{name}: missing")
    if not (text.isascii() and text.isdigit() and len(text) <= 10 and int(text) < _U32):
        raise GuestError(f"{name}: {quoted(text)} is no number")
    return int(text)


def quoted(text: str) -> str:
    """A guest's text for a log line: printable, short."""
    return repr(text if len(text) <= 32 else text[:32] + "...")
