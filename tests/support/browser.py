"""A headless Chromium, driven by the DevTools protocol over a pipe (--remote-debugging-pipe): no port, no library.

Facts: https://chromedevtools.github.io/devtools-protocol/ (domains Page, Runtime, Log, Network, Emulation, Target).
Messages are JSON, each ended by a NUL; the browser reads file descriptor 3 and writes 4.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import orjson

PATIENCE_S = 60

_FLAGS = (
    "--headless=new",
    "--no-sandbox",  # which Chromium refuses to root
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)

# The descriptors come in ascending order, so that the first move cannot overwrite the second.
_LAUNCHER = """import os, sys
os.dup2(int(sys.argv[1]), 3)
os.dup2(int(sys.argv[2]), 4)
os.execv(sys.argv[3], sys.argv[3:])
"""


def find_chromium() -> str | None:
    """The program, None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@attrs.define
class Tab:
    """One page in the browser; ``complaints`` is what its console and log said, ``requests`` the addresses it asked."""

    _browser: Pipe
    _session: str
    complaints: list[str] = attrs.field(factory=list)
    requests: list[str] = attrs.field(factory=list)

    def open(self, path: Path, width: int, height: int, scheme: str) -> None:
        """Show the file in a window of that size, in the colour scheme ``light`` or ``dark``."""
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Page.navigate", url=path.as_uri())
        self._browser.read_until(lambda message: message.get("method") == "Page.loadEventFired", self._take)

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """The answer of a method of the protocol."""
        return self._browser.call(method, parameters, self._session, self._take)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page. Raises AssertionError if it throws."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """A key, down and up."""
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEYS[key])

    def point(self, x: float, y: float) -> None:
        """Move the pointer."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def picture(self, path: Path, whole: bool = True) -> None:
        """Save what is shown, or the whole page, as PNG."""
        answer = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole, **self._clip(whole))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def _clip(self, whole: bool) -> dict[str, object]:
        if not whole:
            return {}
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        return {"clip": {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 6000), "scale": 1}}

    def _take(self, message: dict[str, Any]) -> None:
        method, told = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(told["request"]["url"])
        elif method == "Log.entryAdded":
            self.complaints.append(told["entry"]["text"])
        elif method == "Runtime.exceptionThrown":
            self.complaints.append(str(told["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.complaints.append(str(told["args"]))


KEYS = {"Tab": 9, "Enter": 13, "Escape": 27}


class Pipe:
    """The two pipes to a browser, and the messages that go through them."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to = to_browser
        self._from = from_browser
        self._rest = b""
        self._calls = 0

    def call(self, method: str, parameters: object, session: str | None, take: Any) -> dict[str, Any]:
        """The answer of a method; ``take`` is given every message that comes before it."""
        self._calls += 1
        number = self._calls
        message = {"id": number, "method": method, "params": parameters}
        os.write(self._to, orjson.dumps(message if session is None else {**message, "sessionId": session}) + b"\0")
        answer = self.read_until(lambda message: message.get("id") == number, take)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def read_until(self, wanted: Any, take: Any) -> dict[str, Any]:
        """The first message that is ``wanted``."""
        while True:
            text, found, rest = self._rest.partition(b"\0")
            if not found:
                data = os.read(self._from, 1 << 20)
                assert data, "the browser has gone"
                self._rest += data
                continue
            self._rest = rest
            message: dict[str, Any] = orjson.loads(text)
            take(message)
            if wanted(message):
                return message


@contextmanager
def browser(profile: Path) -> Iterator[Pipe]:
    """A browser with a profile of its own, ended at the end."""
    program = find_chromium()
    assert program is not None
    its_input, to_browser = os.pipe()
    from_browser, its_output = os.pipe()
    launch = [sys.executable, "-c", _LAUNCHER, str(its_input), str(its_output)]
    process = subprocess.Popen(
        [*launch, program, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
        pass_fds=(its_input, its_output),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    os.close(its_input)
    os.close(its_output)
    try:
        yield Pipe(to_browser, from_browser)
    finally:
        os.close(to_browser)
        os.close(from_browser)
        process.terminate()
        process.wait(PATIENCE_S)


def new_tab(pipe: Pipe) -> Tab:
    """An empty page in the browser."""
    target = pipe.call("Target.createTarget", {"url": "about:blank"}, None, _pass)["targetId"]
    session = pipe.call("Target.attachToTarget", {"targetId": target, "flatten": True}, None, _pass)["sessionId"]
    return Tab(pipe, session)


def _pass(_: object) -> None:
    pass
