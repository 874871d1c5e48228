"""evtchnd-bench netguest: what is made of its readings. The readings themselves want the lab."""

from __future__ import annotations

from typing import Any

import pytest

from evtchnd.bench import netguest
from evtchnd.bench.report import Report
from evtchnd.errors import HostError


def reading(number: int, side: str, job: str, **values: float) -> dict[str, Any]:
    return {"round": number, "side": side, "job": job, **values}


def test_ratios_are_medians_of_the_rounds_in_which_both_were_read() -> None:
    report = Report("net")
    rounds = [reading(n, "evtchnd", "tcp_tx", mib_s=rate) for n, rate in ((0, 10.0), (1, 30.0), (2, 20.0), (3, 99.0))]
    rounds += [reading(n, "qemu", "tcp_tx", mib_s=rate) for n, rate in ((0, 5.0), (1, 10.0), (2, 10.0))]
    rounds += [
        reading(0, "evtchnd", "rtt", p50_us=80.0, p99_us=90.0),
        reading(1, "qemu", "rtt", p50_us=100.0, p99_us=1.0),
    ]
    netguest.summarise(report, rounds)
    assert report.ratios == {
        "net.lab.tcp_tx.rate_over_qemu": 2.0,
        "net.lab.tcp_rx.rate_over_qemu": None,
        "net.lab.rtt_p50_over_qemu": None,
    }
    assert report.bounds["net.lab.rtt_p50_over_qemu"] == ("<=", 0.8)
    assert [label for label, _ in report.rows] == [
        "lab tcp_tx evtchnd",
        "lab tcp_tx qemu",
        "lab rtt evtchnd",
        "lab rtt qemu",
    ]
    assert dict(report.rows)["lab tcp_tx evtchnd"] == {"MiB/s": "25.0"}


def test_a_job_that_is_not_there() -> None:
    with pytest.raises(HostError, match="--jobs: no tcp: there are tcp_tx, tcp_rx, "):
        netguest.fill(Report("net"), jobs=["tcp"])
