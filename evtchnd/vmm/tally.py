"""How often each thing happened that a guest can name as it likes: the first few hundred names are told apart."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping

OTHERS = "others"


class Tally:
    """Counts by name, from any thread. Past `most` names the rest are OTHERS."""

    def __init__(self, most: int = 256) -> None:
        self._most = most
        self._lock = threading.Lock()
        self.counts: Counter[str] = Counter()

    def count(self, name: str, times: int = 1) -> str:
        """The name that it is counted by."""
        with self._lock:
            if name not in self.counts and len(self.counts) >= self._most:
                name = OTHERS
            self.counts[name] += times
        return name

    def add(self, counts: Mapping[str, int]) -> None:
        for name, times in counts.items():
            self.count(name, times)
