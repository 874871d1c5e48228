"""A domain's share of the log."""

from __future__ import annotations

import logging

from evtchnd.control import logs


class Log:
    """What gets through, and a clock."""

    def __init__(self, burst: int, per_second: float) -> None:
        self.now = 0.0
        self.share = logs.Share(burst=burst, per_second=per_second, clock=lambda: self.now)

    def say(self, text: str, *args: object) -> str | None:
        record = logging.LogRecord("evtchnd", logging.WARNING, __file__, 1, text, args, None)
        return record.getMessage() if self.share.filter(record) else None


def test_a_domain_that_says_much_hides_no_other() -> None:
    log = Log(burst=3, per_second=0.5)
    lines = [log.say("domain %d: vbd %d: request refused", 7, number) for number in range(1000)]
    assert lines[:3] == [f"domain 7: vbd {number}: request refused" for number in range(3)]
    assert lines[3:] == [None] * 997
    assert log.say("domain 8: vbd 1: connected") == "domain 8: vbd 1: connected"
    assert log.say("worker: no domain at all") == "worker: no domain at all"
    log.now = 1.9
    assert log.say("domain 7: xenstore ring: closed") is None
    log.now = 2.0
    line = log.say("domain 7: xenstore ring: %s", "100 %")
    assert line == "domain 7: xenstore ring: 100 % (998 more lines of domain 7 were left out)"
    assert log.say("domain 7: off") is None
    log.now = 1000.0  # as at first
    assert [log.say("domain 7: off") for _ in range(4)] == [
        "domain 7: off (1 more lines of domain 7 were left out)",
        "domain 7: off",
        "domain 7: off",
        None,
    ]


def test_domains_that_were_are_forgotten() -> None:
    log = Log(burst=1, per_second=0.001)
    for domid in range(5000):
        assert log.say("domain %d: connected", domid) is not None
    assert len(log.share._domains) == logs.MOST_DOMAINS
    assert log.say("domain 4999: connected") is None


def test_every_process_that_logs_has_it() -> None:
    before = logging.getLogger().handlers[:]
    try:
        for form in ("text", "json", "journal"):
            logs.setup("info", form)
            (handler,) = logging.getLogger().handlers
            assert any(isinstance(each, logs.Share) for each in handler.filters)
    finally:
        logging.basicConfig(handlers=before, force=True)
