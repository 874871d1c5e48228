"""The daemon's configuration: `evtchnd.toml`, then `evtchnd.toml.d/*.toml` in the order of their names.

Tables of later files are laid over those of earlier ones, key by key; `[[domains]]` of all files are taken together.
Every fault is reported, one line each: `FILE:KEY: REASON` (or `FILE:LINE: REASON` where it is no TOML at all).
Units are in the names: `_s` seconds, `_us` microseconds, `_bytes` bytes; everything else is a count.
"""

from __future__ import annotations

import dataclasses
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct, field

from evtchnd import diskspec, vifspec
from evtchnd.abi import DOMID_FIRST_RESERVED, EVTCHN_2L_PORTS_64
from evtchnd.errors import OperatorError

Engine = Literal["auto", "io_uring", "threads"]
LogFormat = Literal["auto", "text", "json", "journal"]
LogLevel = Literal["debug", "info", "warning", "error"]

DEFAULT_PATH = Path("/etc/evtchnd/evtchnd.toml")
DEFAULT_RUNTIME_DIR = "/run/evtchnd"

# A wrong file may have many wrong keys; who corrects it reads the first screenful.
_MOST_FAULTS = 20

# Of all queues of a disk: four queues of 16 pages. A ring page holds 32 requests; each costs the journal 128 bytes.
MOST_RING_PAGES = 64

# One tenth of a second is a tick of a busy host, an hour is "never" to whoever waits for a guest.
Seconds = Annotated[float, Meta(ge=0.1, le=3600)]


class Limits(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one guest, one VMM or one operator may cost this host."""

    # A domain costs its worker (about 6 MB private) and 20 descriptors before its devices; 512 guests are more than
    # the largest hosts of Xen's own support statement serve. The domid space ends at 0x7ff0.
    domains: Annotated[int, Meta(ge=1, le=DOMID_FIRST_RESERVED - 1)] = 512
    # Connections that have not registered a domain yet: nobody's memory is known then, only a descriptor is held.
    # A host that starts all its VMMs at once has fewer than this between connect() and REGISTER.
    pending_connections: Annotated[int, Meta(ge=1, le=4096)] = 64
    # From connect() to REGISTER. A VMM sends it at once; libxl's own time-out for a device model is 10 s.
    hello_s: Seconds = 10.0
    # A reply of the VMM to BIND_PORTS: a few ioctls. 10 s is libxl's LIBXL_INIT_TIMEOUT.
    request_s: Seconds = 10.0
    # Messages that a VMM has not read; a device needs two at a time, so a stopped VMM with 64 devices fits in.
    vmm_queue: Annotated[int, Meta(ge=1, le=65536)] = 256
    # KVM had 509 user slots for years (512 less 3 private ones); VMMs are written to need no more. The VMM's protocol
    # ends there, too.
    memory_slots: Annotated[int, Meta(ge=1, le=512)] = 512
    # Xen's default for a guest, gnttab_max_frames=64: 32,768 grants. The VMM's protocol ends there, too.
    grant_frames: Annotated[int, Meta(ge=1, le=64)] = 64
    # Of one domain. The 2-level ABI has 4,096 ports, a few of which the guest keeps for itself.
    ports: Annotated[int, Meta(ge=1, le=EVTCHN_2L_PORTS_64)] = EVTCHN_2L_PORTS_64
    # Of one domain. A disk costs rings of up to 64 pages, their journals and about 16 descriptors.
    disks: Annotated[int, Meta(ge=1, le=1024)] = 64
    # Of one domain. A vif costs, a queue, five descriptors and two or three ports; xl's own guests have a handful.
    vifs: Annotated[int, Meta(ge=1, le=1024)] = 16
    # Opening or closing an image: longer, and its storage hangs. A VMM waits 10 s for each answer.
    image_s: Seconds = 8.0
    # Closing of a disk that its guest has to take part in: libxl's LIBXL_DESTROY_TIMEOUT.
    detach_s: Seconds = 10.0
    # After a restart: from then on, a domain whose VMM has not come back with RESUME has ended. A VMM tries again each
    # 50 ms; a host that starts 512 workers anew takes some seconds.
    resume_s: Seconds = 60.0
    # What the service manager holds over a restart (two a disk, one a domain, one a queue of a vif): the unit's
    # FileDescriptorStoreMax, which systemd tells since 254 ($FDSTORE); before that, it has to be this.
    stored_descriptors: Annotated[int, Meta(ge=1, le=1 << 20)] = 4096
    # Requests in flight when a worker is told to end, as Linux' netback waits for its own.
    drain_s: Seconds = 10.0
    # A worker that dies is started again at once, then after a doubling pause: a guest that kills it on purpose costs
    # the host one fork in half a minute at most.
    restart_pause_s: Seconds = 0.1
    restart_pause_max_s: Seconds = 30.0
    # Workers of one domain that die in a row, none of them older than that pause: the domain is marked then, so that an
    # operator sees it. Fewer than a handful may be the host's bad minute (its memory was short); with pauses that begin
    # at 0.1 s five take 1.5 s.
    worker_deaths: Annotated[int, Meta(ge=1, le=1000)] = 5
    # Operators are people and their scripts.
    operator_connections: Annotated[int, Meta(ge=1, le=1024)] = 32
    # Without a word; a script that holds its connection can open it again.
    operator_idle_s: Seconds = 300.0
    # A call is a few hundred bytes; a disk string ends at PATH_MAX (4,096).
    operator_message_bytes: Annotated[int, Meta(ge=4096, le=16 << 20)] = 65536


class Poll(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Adaptive polling: of the rings before a worker sleeps, of XenStore's clients before the control plane does."""

    # A sleeping CPU takes 50-100 us to wake: looking for about as long can never cost more than twice the wake-up.
    # KVM's own halt polling ends at 200 us. 0: never poll.
    max_us: Annotated[int, Meta(ge=0, le=1000)] = 50


class Vbd(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Block devices."""

    # 16 pages, 512 requests of 11 segments: Linux' blkback ends there (XENBUS_MAX_RING_GRANT_ORDER 4).
    max_ring_page_order: Annotated[int, Meta(ge=0, le=4)] = 4
    # Linux' frontend takes one a vCPU, four at most (xen_blkif_max_queues); one worker serves them all, so that more of
    # them only spare a guest's vCPUs each other's locks. 1: one ring, as before queues.
    max_queues: Annotated[int, Meta(ge=1, le=MOST_RING_PAGES)] = 4
    # 1 MiB a request, Linux' own maximum (MAX_INDIRECT_SEGMENTS). The wire ends at 8 pages of 512, 16 MiB a request; a
    # worker keeps 20 bytes for each of them and each entry of each ring: 10 MiB a disk as it is here, 160 MiB at most.
    # 0: the feature is not offered.
    max_indirect_segments: Annotated[int, Meta(ge=0, le=4096)] = 256
    # auto: io_uring, or threads where the kernel refuses it.
    engine: Engine = "auto"


class Vif(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Network interfaces."""

    # Linux' netfront takes as many as it has vCPUs, eight at most (netif_get_num_default_rss_queues); one worker serves
    # them all, so that more of them only spare a guest's vCPUs each other's locks.
    max_queues: Annotated[int, Meta(ge=1, le=64)] = 4
    # A guest that takes no packet for so long while some wait loses its carrier: netback's rx_stall_timeout. 0: never.
    stall_s: Annotated[float, Meta(ge=0, le=3600)] = 60.0
    # A packet that waits for the guest is dropped then: netback's rx_drain_timeout.
    drain_s: Seconds = 10.0


class Console(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Consoles: what of a guest's output is kept, and for whom."""

    # What `evtchnctl console` shows first: a boot's last screens, or an oops with its registers and stack.
    scrollback_bytes: Annotated[int, Meta(ge=0, le=16 << 20)] = 16384
    # Output that waits for one who does not read (a pty that is not open, a stopped evtchnctl); what is above drops the
    # oldest. Xen's LIBXL_XENCONSOLE_LIMIT.
    buffer_bytes: Annotated[int, Meta(ge=4096, le=64 << 20)] = 1 << 20
    # `evtchnctl console` at one console at the same time: people who look together. Each may cost buffer_bytes.
    clients: Annotated[int, Meta(ge=1, le=256)] = 8
    # Folder of the log files, which has to be there; empty: no logs. It would be a guest's way to the host's disk, so
    # it is the operator who opens it.
    log_dir: str = ""
    # Of one log file; a full one becomes NAME.1 and there is one of these: twice this is the most that a console takes.
    log_bytes: Annotated[int, Meta(ge=4096)] = 4 << 20
    # Into the log, a second; what is above is left out, with a line that counts it. A serial line of 115,200 baud
    # brings 11,520; a kernel's boot (some 100 KiB in a few seconds) passes, since four seconds' worth may come at once.
    log_rate_bytes: Annotated[int, Meta(ge=256)] = 65536


class Xenstore(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Quotas of a guest in XenStore: the defaults of Xen's C server, one by one. Domain 0 has none.

    `evtchnctl xenstore quota` changes them while a domain runs, and so does a reload (SIGHUP).
    """

    nodes: Annotated[int, Meta(ge=1, le=0x7FFFFFFF)] = 1000
    watches: Annotated[int, Meta(ge=1, le=0x7FFFFFFF)] = 128
    outstanding: Annotated[int, Meta(ge=1, le=0x7FFFFFFF)] = 20
    transactions: Annotated[int, Meta(ge=1, le=0x7FFFFFFF)] = 10
    transaction_nodes: Annotated[int, Meta(ge=1, le=0x7FFFFFFF)] = 1024
    permissions: Annotated[int, Meta(ge=1, le=0x7FFFFFFF)] = 5
    # XENSTORE_ABS_PATH_MAX is 3,072, the C server's quota is lower
    path_bytes: Annotated[int, Meta(ge=256, le=3072)] = 2048
    node_bytes: Annotated[int, Meta(ge=64, le=4096)] = 2048
    memory_bytes: Annotated[int, Meta(ge=65536, le=0x7FFFFFFF)] = 2621440
    # Beyond it there is a line in the log
    memory_soft_bytes: Annotated[int, Meta(ge=65536, le=0x7FFFFFFF)] = 2097152
    # Watch events that a client does not read.
    unread_s: Seconds = 20.0


class Domain(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a domain gets as soon as its VMM has registered it."""

    domid: Annotated[int, Meta(ge=1, lt=DOMID_FIRST_RESERVED)]
    # Whose VMM may register it, and so gets what is listed here; not there: whoever may connect to vmm.sock. And root.
    uid: Annotated[int, Meta(ge=0, lt=1 << 32)] | None = None
    # xl's disk strings; see diskspec.py
    disks: tuple[str, ...] = ()
    # xl's vif strings; see vifspec.py
    vifs: tuple[str, ...] = ()
    # Quotas of its own, by the keys of [xenstore], which has the rest of them
    xenstore: dict[str, int] = field(default_factory=dict)

    @property
    def disk_specs(self) -> tuple[diskspec.DiskSpec, ...]:
        """`disks`, read. Paths are absolute (a config file has no current folder)."""
        return tuple(diskspec.parse(text) for text in self.disks)

    @property
    def vif_specs(self) -> tuple[vifspec.VifSpec, ...]:
        """`vifs`, read. Each has the number of its place, as in xl, unless it says another."""
        specs = [vifspec.parse(text) for text in self.vifs]
        return tuple(
            dataclasses.replace(spec, devid=place) if spec.devid is None else spec for place, spec in enumerate(specs)
        )


class Config(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All of it. Every key has a default: an empty file is a good one."""

    # vmm.sock, control.sock and xenstored.sock lie here
    runtime_dir: Annotated[str, Meta(min_length=1)] = DEFAULT_RUNTIME_DIR
    log_level: LogLevel = "info"
    # auto: the journal where standard error is connected to it, else text
    log_format: LogFormat = "auto"
    # workers as tasks of the control plane, for debugging: a guest that stops one stops all
    single_process: bool = False
    # workers without their sandbox (evtchnd/worker/sandbox.py), for debugging: a debugger, or a kernel without seccomp
    sandbox: bool = True
    limits: Limits = field(default_factory=Limits)
    poll: Poll = field(default_factory=Poll)
    vbd: Vbd = field(default_factory=Vbd)
    vif: Vif = field(default_factory=Vif)
    console: Console = field(default_factory=Console)
    xenstore: Xenstore = field(default_factory=Xenstore)
    domains: tuple[Domain, ...] = ()

    def xenstore_of(self, domid: int) -> Xenstore | None:
        """The quotas of a domain that has some of its own. ValidationError if they are none."""
        own = next((domain.xenstore for domain in self.domains if domain.domid == domid), {})
        return msgspec.convert({**msgspec.structs.asdict(self.xenstore), **own}, Xenstore) if own else None

    @property
    def vmm_socket(self) -> Path:
        """Where VMMs connect (SOCK_SEQPACKET)."""
        return Path(self.runtime_dir) / "vmm.sock"

    @property
    def control_socket(self) -> Path:
        """Where operators connect (Varlink)."""
        return Path(self.runtime_dir) / "control.sock"

    @property
    def xenstore_socket(self) -> Path:
        """Where xenstore-ls and its kin connect (XENSTORED_PATH)."""
        return Path(self.runtime_dir) / "xenstored.sock"


class ConfigError(OperatorError):
    """One or several faults of a configuration; `faults` has a line for each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def replace(config: Config, **changes: Any) -> Config:
    """The same config with some keys changed (what the command line says goes last)."""
    return msgspec.structs.replace(config, **changes)


def load(path: Path | None) -> Config:
    """Reads `path` and the drop-ins beside it; None: /etc/evtchnd/evtchnd.toml, which may be missing.

    ConfigError with every fault that was found.
    """
    if path is None:
        path = DEFAULT_PATH
        files = [path, *_dropins(path)] if path.exists() else _dropins(path)
    else:
        files = [path, *_dropins(path)]
    faults: list[str] = []
    origins = _Origins()
    merged: dict[str, Any] = {}
    for file in files:
        try:
            text = file.read_text("utf-8")
            _lay_over(merged, tomllib.loads(text), origins, str(file))
        except OSError as exc:
            faults.append(f"{file}: {exc.strerror}")
        except UnicodeDecodeError as exc:
            faults.append(f"{file}: byte {exc.start} is no UTF-8")
        except tomllib.TOMLDecodeError as exc:
            faults.append(_toml_fault(str(file), str(exc), len(text.splitlines())))
    config, wrong = _convert(merged)
    for key, reason in [*wrong, *_cross_checks(config)]:
        # a quoted key may have any character; a fault is one line
        faults.append("".join(c if c.isprintable() else "?" for c in f"{origins.name(key)}: {reason}"))
    if faults:
        raise ConfigError(faults)
    return config


def _dropins(path: Path) -> list[Path]:
    folder = path.with_name(path.name + ".d")
    return sorted(folder.glob("*.toml")) if folder.is_dir() else []


class _Origins:
    """Which file said a key last, and which entry of a list it is there."""

    def __init__(self) -> None:
        self._files: dict[str, str] = {}
        self._entries: dict[str, str] = {}

    def note(self, key: str, file: str, entry: str = "") -> None:
        """`entry`: the name in its own file of an entry of a list that several files fill."""
        self._files[key] = file
        if entry:
            self._entries[key] = entry

    def name(self, key: str) -> str:
        """FILE:KEY."""
        found = key
        while found and found not in self._files:
            # `domains[2].disks[0]` -> `domains[2].disks` -> `domains[2]`
            found = re.sub(r"(\[[^\[\]]*\]|\.?[^.\[\]]+)$", "", found)
        return f"{self._files.get(found, 'config')}:{self._entries.get(found, found)}{key[len(found) :]}"


def _lay_over(base: dict[str, Any], over: Mapping[str, Any], origins: _Origins, file: str, prefix: str = "") -> None:
    for name, value in over.items():
        key = f"{prefix}{name}"
        origins.note(key, file)
        below = base.get(name)
        if isinstance(value, dict):
            if not isinstance(below, dict):
                below = base[name] = {}
            _lay_over(below, value, origins, file, f"{key}.")
        elif key == "domains" and isinstance(value, list):
            here = base[name] = [*below] if isinstance(below, list) else []
            for number, entry in enumerate(value):
                origins.note(f"domains[{len(here)}]", file, f"domains[{number}]")
                here.append(entry)
        else:
            base[name] = value


def _toml_fault(file: str, text: str, lines: int) -> str:
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column \d+|end of document)\)", text)
    return f"{file}:{found[2] or lines}: {found[1]}" if found else f"{file}: {text}"


def _convert(tree: dict[str, Any]) -> tuple[Config, list[tuple[str, str]]]:
    """The config of `tree` without what is wrong in it, and (key, reason) of each wrong entry."""
    faults: list[tuple[str, str]] = []
    domains = tree.get("domains")
    if isinstance(domains, list):
        # one by one: the fault of an entry must not shift the numbers of those behind it
        good = []
        for index, entry in enumerate(domains):
            try:
                good.append(msgspec.convert(entry, Domain))
            except msgspec.ValidationError as exc:
                key, reason = _explain(str(exc))
                faults.append((_join(f"domains[{index}]", key), reason))
        tree = {**tree, "domains": [] if faults else [msgspec.to_builtins(domain) for domain in good]}
    while True:
        try:
            return msgspec.convert(tree, Config), faults
        except msgspec.ValidationError as exc:
            key, reason = _explain(str(exc))
            faults.append((key, reason))
            # take the wrong key out and look for the next
            if len(faults) >= _MOST_FAULTS or not _cut(tree, key):
                return Config(), faults


def _explain(text: str) -> tuple[str, str]:
    """msgspec's "Expected `int` <= 4 - at `$.vbd.order`" as key and reason."""
    reason, _, place = text.partition(" - at `")
    key = place.removesuffix("`").removeprefix("$").removeprefix(".")
    unknown = re.fullmatch(r"Object contains unknown field `(.*)`", reason)
    missing = re.fullmatch(r"Object missing required field `(.*)`", reason)
    if unknown:
        return _join(key, unknown[1]), "no such key"
    if missing:
        return key, f"key {missing[1]} is missing"
    return key, reason[:1].lower() + reason[1:].replace("`", "")


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key and name else key or name


def _cut(tree: dict[str, Any], key: str) -> bool:
    """Removes the key `a.b.c` of nested tables; False if it is not there."""
    *tables, name = key.split(".")
    for table in tables:
        below = tree.get(table)
        if not isinstance(below, dict):
            return False
        tree = below
    return tree.pop(name, None) is not None


def _cross_checks(config: Config) -> Iterator[tuple[str, str]]:
    """What one value alone does not show."""
    if not os.path.isabs(config.runtime_dir):  # noqa: PTH117 -- the text as it stands, before Path tidies it
        yield "runtime_dir", "must be an absolute path"
    if config.console.log_dir and not os.path.isabs(config.console.log_dir):  # noqa: PTH117 -- as above
        yield "console.log_dir", "must be an absolute path"
    if config.limits.restart_pause_s > config.limits.restart_pause_max_s:
        yield "limits.restart_pause_s", f"above limits.restart_pause_max_s ({config.limits.restart_pause_max_s:g})"
    if 0 < config.vbd.max_indirect_segments <= 11:
        yield "vbd.max_indirect_segments", "11 fit without indirection: 0 turns it off, 12 is the least"
    if config.vbd.max_queues << config.vbd.max_ring_page_order > MOST_RING_PAGES:
        most = MOST_RING_PAGES >> config.vbd.max_ring_page_order
        reason = f"rings of {1 << config.vbd.max_ring_page_order} pages (vbd.max_ring_page_order) leave room for {most}"
        yield "vbd.max_queues", reason
    seen: dict[int, int] = {}
    for index, domain in enumerate(config.domains):
        first = seen.setdefault(domain.domid, index)
        if first != index:
            yield f"domains[{index}].domid", f"domain {domain.domid} has an entry already"
        if "unread_s" in domain.xenstore:
            yield f"domains[{index}].xenstore.unread_s", "is the same for all domains (xenstore.unread_s)"
        elif first == index:
            try:
                config.xenstore_of(domain.domid)
            except msgspec.ValidationError as exc:
                key, reason = _explain(str(exc))
                yield _join(f"domains[{index}].xenstore", key), reason
        devices: dict[int, int] = {}
        for number, text in enumerate(domain.disks):
            key = f"domains[{index}].disks[{number}]"
            try:
                spec = diskspec.parse(text)
            except OperatorError as exc:
                yield key, str(exc)
                continue
            if not spec.target.is_absolute():
                yield key, f"target '{spec.target}' must be an absolute path"
            if devices.setdefault(spec.devid, number) != number:
                yield key, f"vdev {spec.vdev} is taken by disks[{devices[spec.devid]}]"
        yield from _vif_checks(domain, f"domains[{index}].vifs")


def _vif_checks(domain: Domain, key: str) -> Iterator[tuple[str, str]]:
    numbers: dict[int, int] = {}
    for place, text in enumerate(domain.vifs):
        try:
            spec = vifspec.parse(text)
        except OperatorError as exc:
            yield f"{key}[{place}]", str(exc)
            continue
        devid = place if spec.devid is None else spec.devid
        if numbers.setdefault(devid, place) != place:
            yield f"{key}[{place}]", f"devid {devid} is taken by vifs[{numbers[devid]}]"
