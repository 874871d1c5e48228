"""Something that takes its time, done beside the rest of a start."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Loading(threading.Thread):
    """`load` in a thread of its own."""

    def __init__(self, load: Callable[[], None]) -> None:
        super().__init__(name="loading")
        self._load = load
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        try:
            self._load()
        except BaseException as error:  # result() raises it
            self._error = error

    def result(self) -> None:
        """Waits for its end; raises what `load` did."""
        self.join()
        if self._error is not None:
            raise self._error
