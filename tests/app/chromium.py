"""A headless Chromium that tests drive by the DevTools protocol, over a pipe: no package is needed for that."""

import base64
import contextlib
import json
import os
import pathlib
import select
import shutil
import subprocess
import sys
import time
from typing import Any

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
    # A mouse, which a headless browser lacks: it hovers (2) and points finely (4).
    "--blink-settings=primaryHoverType=2,availableHoverTypes=2,primaryPointerType=4,availablePointerTypes=4",
)
# The browser reads descriptor 3 and writes 4. Not as `preexec_fn`: JAX warns of a fork.
_LAUNCH = """
import os, sys
for number, free in zip(sys.argv[1:3], (100, 101)):
    os.dup2(int(number), free)
os.dup2(100, 3)
os.dup2(101, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
SECONDS = 60.0  # until a test gives up waiting for anything


def program() -> str | None:
    """Path of a Chromium or Chrome; None if there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next((found for name in names if (found := shutil.which(name))), None)


class Browser:
    """A running Chromium. Messages in both directions are JSON with a NUL byte after each."""

    def __init__(self, executable: str, profile: pathlib.Path):
        to_read, self._write = os.pipe()
        self._read, to_write = os.pipe()
        self._buffer = b""
        self._count = 0
        self.events: list[dict[str, Any]] = []

        given = [sys.executable, "-I", "-c", _LAUNCH, str(to_read), str(to_write), executable, *FLAGS]
        self._process = subprocess.Popen(
            [*given, f"--user-data-dir={profile}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=(to_read, to_write),
        )
        os.close(to_read)
        os.close(to_write)

    def close(self) -> None:
        """Ends the browser."""
        with contextlib.suppress(OSError, RuntimeError, TimeoutError):
            self.send("Browser.close")
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._write)
        os.close(self._read)

    def send(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Result of a command; events that come before it are kept in `events`."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": parameters}
        if session:
            message["sessionId"] = session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        end = time.monotonic() + SECONDS
        while True:
            answer = self._receive(end)
            if answer.get("id") == self._count:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]
            if "method" in answer:
                self.events.append(answer)

    def _receive(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._read], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError("the browser does not answer")
            part = os.read(self._read, 1 << 20)
            if not part:
                raise RuntimeError("the browser has ended")
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)

    def page(self, url: str) -> "Page":
        """Opens a page and waits until it is loaded."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        for domain in ("Page", "Runtime", "DOM", "Log"):
            page.send(f"{domain}.enable")
        page.send("Page.navigate", url=url)
        page.wait("document.readyState === 'complete'")
        return page


class Page:
    """A tab of the browser."""

    def __init__(self, browser: Browser, session: str, target: str):
        self.browser, self._session, self._target = browser, session, target
        self.expected_errors: list[str] = []

    def close(self) -> None:
        """Closes the tab."""
        self.browser.send("Target.closeTarget", targetId=self._target)

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Result of a command to this tab."""
        return self.browser.send(method, self._session, **parameters)

    def run(self, script: str) -> Any:
        """Value of a JavaScript expression, after its promise is fulfilled; RuntimeError if it throws."""
        found = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(found["exceptionDetails"].get("exception", {}).get("description", "exception"))
        return found["result"].get("value")

    def wait(self, condition: str) -> Any:
        """First value of an expression that counts as true."""
        end = time.monotonic() + SECONDS
        while not (value := self.run(condition)):
            if time.monotonic() > end:
                raise TimeoutError(f"still false: {condition}")
            time.sleep(0.03)
        return value

    def choose(self, selector: str, path: pathlib.Path) -> None:
        """Chooses a file in a file input, as a user does in the dialog."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=node, files=[str(path)])

    def media(self, *, width: int, height: int, dark: bool = False, phone: bool = False) -> None:
        """Sets the size of the window, the colour scheme, and whether it is a phone."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        scheme = "dark" if dark else "light"
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, path: pathlib.Path, *, whole: bool = True) -> None:
        """Writes the page as PNG, or only the visible part."""
        data = self.send("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def errors(self) -> list[str]:
        """Exceptions of scripts, and what the browser has logged as errors, such as violations of the CSP."""
        self.run("0")
        found = []
        for event in self.browser.events:
            if event.get("sessionId") != self._session:
                continue
            if event["method"] == "Runtime.exceptionThrown":
                found.append(event["params"]["exceptionDetails"]["exception"].get("description", "exception"))
            elif event["method"] == "Log.entryAdded" and event["params"]["entry"]["level"] == "error":
                found.append(event["params"]["entry"]["text"])
        return found
