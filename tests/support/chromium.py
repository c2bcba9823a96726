"""Headless Chromium for tests, controlled with the DevTools protocol over two pipes.

https://chromedevtools.github.io/devtools-protocol. With `--remote-debugging-pipe` the browser reads JSON messages that
end in a zero byte from file descriptor 3 and writes responses to 4. No port, driver or package is needed.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-pipe"
)
# Key codes of named keys; for other keys the code is that of the character.
NAMED = {"ArrowLeft": 37, "ArrowRight": 39, "Escape": 27, " ": 32}


class Chromium:
    """A browser process. `open` opens a page."""

    def __init__(self, profile: Path) -> None:
        assert CHROMIUM is not None, "the caller checks that Chromium is installed"
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        command = f'exec "$0" "$@" 3<&{to_read} 4>&{to_write}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}"],
            pass_fds=(to_read, to_write),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_read)
        os.close(to_write)
        self._number = 0
        self._rest = b""
        self.events: list[dict[str, Any]] = []

    def call(self, method: str, session: str | None = None, **values: Any) -> dict[str, Any]:
        """Call a DevTools method and return its result. Raises AssertionError with the browser's error, or after 30
        seconds."""
        self._number += 1
        request: dict[str, Any] = {"id": self._number, "method": method, "params": values}
        if session is not None:
            request["sessionId"] = session
        os.write(self._write, json.dumps(request).encode() + b"\0")
        end = time.time() + 30
        while True:
            message = self._receive(end - time.time())
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return dict(message["result"])
            self.events.append(message)

    def open(self, url: str) -> Page:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "Network", "Log"):
            page.call(f"{domain}.enable")
        page.go(url)
        return page

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(20)
        os.close(self._write)
        os.close(self._read)

    def _receive(self, seconds: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._read], [], [], max(0.0, seconds))
            assert ready, "the browser did not respond"
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser has exited"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return dict(json.loads(message))


class Page:
    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target

    def call(self, method: str, **values: Any) -> dict[str, Any]:
        return self._browser.call(method, self._session, **values)

    def go(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def reload(self) -> None:
        self.run("window.stale = true")
        self.call("Page.reload")
        self.wait("document.readyState === 'complete' && !window.stale")

    def bring_to_front(self) -> None:
        self.call("Page.bringToFront")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait(self, expression: str, seconds: float = 15) -> None:
        end = time.time() + seconds
        while not self._is_true(expression):
            assert time.time() < end, f"not true in {seconds} s: {expression}\n{self.run('document.body.innerText')}"
            time.sleep(0.02)

    def _is_true(self, expression: str) -> bool:
        try:
            return bool(self.run(f"Boolean({expression})"))
        except AssertionError:  # while a new document loads, nothing can be evaluated
            return False

    def text(self, selector: str) -> str:
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def press(self, key: str) -> None:
        """Press and release a key; the focused element receives it."""
        event: dict[str, Any] = {"key": key, "windowsVirtualKeyCode": NAMED.get(key, ord(key[0].upper()))}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=key if len(key) == 1 else "", **event)
        self.call("Input.dispatchKeyEvent", type="keyUp", **event)

    def click(self, selector: str) -> None:
        box = self.run(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)}).getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=box[0], y=box[1], button="left", clickCount=1)

    def resize(self, width: int, height: int, *, dark: bool = False) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"]))

    @property
    def errors(self) -> list[str]:
        """Errors of this page: uncaught exceptions and errors in the browser's log."""
        messages = []
        for event in self._browser.events:
            if event.get("sessionId") != self._session:
                continue
            values = event.get("params", {})
            if event["method"] == "Runtime.exceptionThrown":
                messages.append(str(values["exceptionDetails"]))
            if event["method"] == "Log.entryAdded" and values["entry"]["level"] == "error":
                messages.append(values["entry"]["text"])
        return messages

    @property
    def requested(self) -> list[str]:
        return [
            event["params"]["request"]["url"]
            for event in self._browser.events
            if event.get("sessionId") == self._session and event["method"] == "Network.requestWillBeSent"
        ]

    def close(self) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)
