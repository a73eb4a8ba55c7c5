"""A real browser without a window: opens a page and says what went wrong there.

It is Debian's chromium, driven through its DevTools protocol over a pipe (--remote-debugging-pipe: messages of JSON, each
ended by a zero byte, on the file descriptors 3 and 4), so that no driver has to be installed.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--remote-debugging-pipe",
)  # fmt: skip
# Once all pictures have loaded or failed: where each stands, and how wide it came out.
PICTURES = """
Promise.all([...document.images].map(image => image.decode().catch(() => null))).then(() => JSON.stringify({
  images: [...document.images].map(image => [image.alt, image.naturalWidth]),
  title: document.title, text: document.body.innerText, width: document.documentElement.scrollWidth, window: innerWidth}))
"""


@dataclass
class Opened:
    """images: (alt, natural width) of each. problems: errors and warnings of the console, exceptions, failed requests.
    overflows: whether the page is wider than the window."""

    images: list[tuple[str, int]]
    problems: list[str]
    title: str
    text: str
    overflows: bool

    @property
    def broken(self) -> list[str]:
        return [alt for alt, width in self.images if not width]


def missing() -> bool:
    return all(shutil.which(name) is None for name in NAMES)


class Browser:
    """`open` opens a file. A context, since it is a process."""

    def __init__(self, seconds: float = 60):
        self.seconds, self._count, self._buffer = seconds, 0, b""
        self._events: list[dict[str, Any]] = []

    def __enter__(self) -> Browser:
        self._profile = tempfile.TemporaryDirectory(prefix="browser", ignore_cleanup_errors=True)
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        program = next(path for path in map(shutil.which, NAMES) if path)
        command = [program, *FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        script = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", script, "browser", *command], pass_fds=(to_browser, from_browser), stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, env={**os.environ, "HOME": self._profile.name},
        )  # fmt: skip
        os.close(to_browser), os.close(from_browser)
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read), os.close(self._write)
        self._profile.cleanup()

    def open(self, path: Path, width: int = 1200) -> Opened:
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._events.clear()
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable", session)
        self._call("Emulation.setDeviceMetricsOverride", session, width=width, height=900, deviceScaleFactor=1, mobile=False)
        self._call("Page.navigate", session, url=path.resolve().as_uri())
        self._until(lambda event: event["method"] == "Page.loadEventFired")
        answer = self._call("Runtime.evaluate", session, expression=PICTURES, awaitPromise=True)
        found = json.loads(answer["result"]["value"])
        self._call("Target.closeTarget", targetId=target)
        problems = [problem for problem in map(_problem, self._events) if problem]
        images = [tuple(image) for image in found["images"]]
        return Opened(images, problems, found["title"], found["text"], found["width"] > found["window"])

    def _call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._write, json.dumps(message).encode() + b"\0")
        number = self._count
        answer = self._until(lambda received: received.get("id") == number)
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _until(self, wanted: Any) -> dict[str, Any]:
        """The first message that is wanted; events before it, and it, are kept."""
        deadline = time.monotonic() + self.seconds
        while True:
            while b"\0" not in self._buffer:
                if not select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))[0]:
                    raise TimeoutError("the browser does not answer")
                received = os.read(self._read, 1 << 20)
                if not received:
                    raise RuntimeError(f"the browser ended with status {self._process.wait()}")
                self._buffer += received
            text, _, self._buffer = self._buffer.partition(b"\0")
            message = json.loads(text)
            if "method" in message:
                self._events.append(message)
            if wanted(message if "method" in message or "id" in message else {}):
                return message


def _problem(event: dict[str, Any]) -> str | None:
    kind, told = event["method"], event["params"]
    if kind == "Runtime.exceptionThrown":
        return f"exception: {told['exceptionDetails'].get('text')}"
    if kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "assert", "warning"):
        return f"console: {told['type']}"
    if kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
        return f"log: {told['entry']['text']}"
    if kind == "Network.loadingFailed":
        return f"request: {told.get('errorText')} {told.get('blockedReason', '')}"
    return None
