"""Where decisions go: an LSL outlet, UDP, lines of JSON. A sink is any function of a decision (a dict of plain values).

A decision holds `sample` (number of the window's last sample), `time` (that sample's), `probabilities` by class,
`decision` and `command` (names, or None), `abstained` (why, or ""), `latency` and `compute` in seconds.
"""

import ipaddress
import json
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nearfar.core.errors import UserError
from nearfar.eeg.live.sources import lsl

Sink = Callable[[dict[str, Any]], None]


class Outlet:
    """An LSL stream of irregular rate: `decision` and `command` (class numbers, -1 for none), then each probability."""

    def __init__(self, classes: Sequence[str], name: str = "nearfar-decisions") -> None:
        library, self.classes = lsl(), list(classes)
        info = library.StreamInfo(name, "decisions", 2 + len(classes), 0.0, "float64", f"{name}-{socket.gethostname()}")
        info.set_channel_names(["decision", "command", *classes])
        self._outlet = library.StreamOutlet(info)

    def __call__(self, decision: dict[str, Any]) -> None:
        """Send it, stamped with the time of the window's last sample."""
        numbers = [self.classes.index(decision[key]) if decision[key] else -1 for key in ("decision", "command")]
        shares = [np.nan if share is None else share for share in decision["probabilities"].values()]
        self._outlet.push_sample(np.array([*numbers, *shares]), timestamp=decision["time"])


class Udp:
    """One JSON object in a datagram, to a port of this machine."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        if host != "localhost" and not ipaddress.ip_address(host).is_loopback:
            raise UserError(f"{host}: decisions are sent to this machine alone (127.0.0.1)")
        if not 0 < port < 65536:
            raise UserError(f"port must lie between 1 and 65535, got {port}")
        self._to = (host, port)
        self._socket = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM)

    def __call__(self, decision: dict[str, Any]) -> None:
        """Send it."""
        self._socket.sendto(json.dumps(decision).encode(), self._to)


class Lines:
    """One JSON object a line, in a file or (without a path) on standard output."""

    def __init__(self, path: str | Path | None = None) -> None:
        self._stream = sys.stdout if path is None else Path(path).open("w", encoding="utf-8")  # noqa: SIM115

    def __call__(self, decision: dict[str, Any]) -> None:
        """Write it at once."""
        self._stream.write(json.dumps(decision) + "\n")
        self._stream.flush()
