"""Calibration: cues by a plan, shown in the terminal or as a page in the browser, and noted with the samples."""

import json
import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from nearfar.core.errors import UserError
from nearfar.eeg.live.sources import lsl

SIGNS = {"left_hand": "←", "right_hand": "→", "feet": "↓", "fists": "↑", "tongue": "↑", "rest": "·"}


@dataclass(frozen=True)
class CuePlan:
    """Which cues come, and when.

    classes: what is imagined. trials: of each class. cue, rest: seconds of a cue, and of the pause before each.
    jitter: up to so many seconds are added to a pause. seed: of order and pauses. lead: seconds before the first.

    The order is drawn in blocks that hold each class once, so that classes take turns.
    """

    classes: tuple[str, ...] = ("left_hand", "right_hand")
    trials: int = 15
    cue: float = 4.0
    rest: float = 2.0
    jitter: float = 1.0
    lead: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(set(self.classes)) < 2 or len(set(self.classes)) < len(self.classes):
            raise ValueError(f"classes must be two or more, each once, got {', '.join(self.classes)}")
        if self.trials < 1 or not self.cue > 0 or min(self.rest, self.jitter, self.lead) < 0:
            raise ValueError("trials must be 1 or more, cue above 0 s, rest, jitter and lead 0 s or more")

    def cues(self) -> list[tuple[float, str]]:
        """(seconds from the start, class) of each cue."""
        drawn, at, found = random.Random(self.seed), self.lead, []
        for _ in range(self.trials):
            for name in drawn.sample(self.classes, len(self.classes)):
                at += self.rest + drawn.uniform(0, self.jitter)
                found.append((at, name))
                at += self.cue
        return found

    @property
    def seconds(self) -> float:
        """From the start to the end of the last cue, and the rest after it."""
        return self.cues()[-1][0] + self.cue + self.rest


class Cues:
    """Gives the cues of a plan when they are due; `markers` and `stop` of `session.run`.

    clock: seconds of the source's clock. shows: called with what is to be seen: a class, or "" for a pause, and how
    many cues have come, of how many.
    """

    def __init__(
        self, plan: CuePlan, clock: Callable[[], float], shows: Sequence[Callable[[str, int, int], Any]] = ()
    ) -> None:
        self.plan, self.clock, self.shows = plan, clock, shows
        cues = plan.cues()
        self._all = [(at, name) for at, name in cues] + [(at + plan.cue, "") for at, _ in cues]
        self._all.sort()
        self._given, self._seen = 0, 0
        self._start: float | None = None

    def markers(self) -> list[tuple[float, str]]:
        """The cues that have become due, at the time when they were shown."""
        now = self.clock()
        if self._start is None:  # the first samples have come
            self._start = now
            self._show("")
        due = []
        while self._given < len(self._all) and self._start + self._all[self._given][0] <= now:
            name = self._all[self._given][1]
            self._given += 1
            self._seen += bool(name)
            self._show(name)
            due.append((self.clock(), name or "pause"))
        return due

    def stop(self) -> bool:
        """Whether the plan is over."""
        return self._start is not None and self.clock() - self._start >= self.plan.seconds

    def _show(self, name: str) -> None:
        for show in self.shows:
            show(name, self._seen, len(self._all) // 2)


class MarkerOutlet:
    """Sends what is shown as an LSL stream of texts."""

    def __init__(self, name: str = "nearfar-markers") -> None:
        info = lsl().StreamInfo(name, "Markers", 1, 0.0, "string", name)
        info.set_channel_names(["marker"])
        self._outlet = lsl().StreamOutlet(info)

    def __call__(self, name: str, seen: int, total: int) -> None:
        """Send a class, or "pause"."""
        self._outlet.push_sample([name or "pause"])


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Cues</title><style>
html { height: 100%; background: #111; color: #eee; font-family: system-ui, sans-serif }
body { height: 100%; margin: 0; display: grid; place-content: center; text-align: center }
#sign { font-size: 40vh; line-height: 1; min-height: 40vh } #name { font-size: 6vh; min-height: 8vh }
#count { position: fixed; bottom: 1rem; right: 1rem; color: #888 }
</style><div id="sign">+</div><div id="name"></div><div id="count"></div><script>
let last = -1
async function next() {
  try {
    const cue = await (await fetch("cue?after=" + last)).json()
    last = cue.number
    for (const key of ["sign", "name", "count"]) document.getElementById(key).textContent = cue[key]
  } catch (error) { document.getElementById("name").textContent = "ended"; return }
  next()
}
next()
</script></html>"""


class CuePage:
    """A page of cues on this machine, without anything from elsewhere; `url` says where. The page waits for each cue
    (it asks, and is answered when there is one), so that no polling delays it."""

    def __init__(self, port: int = 0) -> None:
        self._changed = threading.Condition()
        self._now: dict[str, Any] = {"number": 0, "sign": "+", "name": "", "count": ""}
        page = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if self.path.startswith("/cue?after="):
                    text, kind = json.dumps(page._after(self.path.rpartition("=")[2])), "application/json"
                elif self.path == "/":
                    text, kind = PAGE, "text/html; charset=utf-8"
                else:
                    return self.send_error(404)
                body = text.encode()
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Cache-Control", "no-store")
                self.end_headers()
                self.wfile.write(body)
                return None

            def log_message(self, *_: Any) -> None:
                pass

        try:
            self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        except OSError as error:
            raise UserError(f"port {port}: cannot be opened ({error.strerror}); choose another") from error
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def __call__(self, name: str, seen: int, total: int) -> None:
        """Show a class, or a cross for a pause."""
        with self._changed:
            sign = SIGNS.get(name, name[:1].upper() or "+")
            shown = {"sign": sign, "name": name.replace("_", " "), "count": f"{seen} of {total}"}
            self._now = {"number": self._now["number"] + 1} | shown
            self._changed.notify_all()

    def _after(self, number: str) -> dict[str, Any]:
        with self._changed:
            known = int(number) if number.lstrip("-").isdigit() else -1
            self._changed.wait_for(lambda: self._now["number"] != known, timeout=20)
            return self._now

    def close(self) -> None:
        """Close it."""
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
