"""Chromium, driven through chromedriver's own protocol (W3C WebDriver), so that looking at a page needs no package.

`python -m tests.browser PAGE.html OUT.png [width] [light|dark]` takes a picture of a whole page.
"""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-dev-shm-usage",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
)  # fmt: skip


def missing() -> str:
    """Why no browser can be driven here; "" when one can."""
    if not any(map(shutil.which, BROWSERS)):
        return "no Chromium (Debian: apt-get install chromium chromium-driver)"
    return "" if shutil.which("chromedriver") else "no chromedriver (Debian: apt-get install chromium-driver)"


class Page:
    """One browser window."""

    def __init__(self, port: int, binary: str, profile: str) -> None:
        self._base = f"http://127.0.0.1:{port}"
        options = {"binary": binary, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
        made = self._call("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self._base += f"/session/{made['sessionId']}"

    def open(self, path: Path, width: int, dark: bool = False, height: int = 900) -> None:
        """Show a file at `width` CSS pixels, phones included."""
        self.visit(path.resolve().as_uri(), width, dark, height)

    def visit(self, url: str, width: int, dark: bool = False, height: int = 900) -> None:
        """Show what is at `url`, likewise."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", metrics)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", {"features": [scheme]})
        self._call("POST", "/url", {"url": url})

    def run(self, script: str) -> Any:
        """What the body of a JavaScript function returns."""
        return self._call("POST", "/execute/sync", {"script": script, "args": []})

    def console(self) -> list[str]:
        """Warnings and errors of the page since the last call."""
        found = self._call("POST", "/se/log", {"type": "browser"})
        return [f"{e['level']}: {e['message']}" for e in found if e["level"] in ("WARNING", "SEVERE")]

    def shoot(self, path: Path) -> None:
        """A picture of the whole page."""
        width, height = self.run("return [innerWidth, document.documentElement.scrollHeight]")
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.cdp("Emulation.setDeviceMetricsOverride", metrics)  # all of it in view, so that all of it is painted
        self.run("return new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))")
        taken = self.cdp("Page.captureScreenshot", {"captureBeyondViewport": False})
        path.write_bytes(base64.b64decode(taken["data"]))

    def cdp(self, command: str, params: dict[str, Any]) -> Any:
        """A command of the DevTools protocol."""
        return self._call("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def close(self) -> None:
        """End the session."""
        self._call("DELETE", "", None)

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, data, {"Content-Type": "application/json"}, method=method)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=120) as reply:
                return json.load(reply)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.read().decode()[:500]}") from error


@contextmanager
def browser() -> Iterator[Page]:
    """A Chromium window, closed at the end."""
    binary = next(b for b in map(shutil.which, BROWSERS) if b)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _wait(port)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
            page = Page(port, binary, profile)
            try:
                yield page
            finally:
                page.close()
    finally:
        driver.terminate()
        driver.wait(10)


def _wait(port: int) -> None:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError("chromedriver did not start within 30 seconds")


if __name__ == "__main__":
    source, target, *rest = sys.argv[1:]
    with browser() as shown:
        shown.open(Path(source), int(rest[0]) if rest else 1280, dark="dark" in rest)
        shown.shoot(Path(target))
        sys.stdout.writelines(f"{line}\n" for line in shown.console())
