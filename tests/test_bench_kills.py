"""Workers killed at random under a checked load: a few of what `evtchnd.bench.kills` runs by the thousand."""

from __future__ import annotations

import pytest

from evtchnd.bench import kills
from kvmguest import why_no_kvm
from scale import scaled


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kvm", [False, True], ids=["soft", "kvm"])
def test_what_guests_see_of_killed_workers(kvm: bool) -> None:
    if kvm and (why := why_no_kvm()):
        pytest.skip(why)
    count = scaled(200, least=10)
    readings = kills.run(count, 1, domains=1 if kvm else 2, kvm=kvm)
    assert readings["kills.run"] >= count
    assert readings["kills.answers"] > 50 * count
    assert (readings["kills.bad_blocks"], readings["kills.duplicates"]) == (0, 0)
    assert 0 < readings["worker_restart_ms_p50"] <= readings["worker_restart_ms_p99"]
