"""systemd/: the template filled in, and the files beside it, laid out in a folder as systemd wants them."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SOURCE = ROOT / "systemd"


def render(folder: Path, *, tap: bool = False) -> list[Path]:
    """Units into `folder`, with the running interpreter's evtchnd; `tap`: with the drop-in. Returns the units."""
    folder.mkdir(parents=True, exist_ok=True)
    bindir = Path(sys.executable).parent
    units = []
    for name in ("evtchnd.service", "evtchnd-fd.service"):
        text = (SOURCE / f"{name}.in").read_text().replace("@bindir@", str(bindir))
        if not (bindir / "evtchnd").exists():
            # not installed: the checkout itself
            text = text.replace(f"ExecStart={bindir}/evtchnd", f"ExecStart={sys.executable} -m evtchnd")
            text = text.replace("[Service]", f"[Service]\nEnvironment=PYTHONPATH={ROOT}:{ROOT}/backends", 1)
        units.append(folder / name)
        units[-1].write_text(text)
    units += [Path(shutil.copy(source, folder)) for source in sorted(SOURCE.glob("*.socket"))]
    shutil.copy(SOURCE / "evtchnd-fd.socket.conf", folder)
    if tap:
        shutil.copytree(SOURCE / "evtchnd.service.d", folder / "evtchnd.service.d")
    return units
