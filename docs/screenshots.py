"""Takes the README's screenshots again, of what ``make demo`` materialised.

Headless Chromium is driven over its DevTools protocol: Dagster's web UI loads its data piece by
piece, so a picture is taken when the page shows what it should, not after a fixed time.
"""

from __future__ import annotations

import base64
import itertools
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from websockets.sync.client import ClientConnection, connect

from recflow.adapters.artifact_store import ArtifactStore
from recflow.adapters.keys import REPORT
from recflow.core.artifacts import JsonValue
from recflow.core.errors import ConfigError, RecflowError
from recflow.demo import Deployment, find_deployment
from recflow.settings import PROJECT_ROOT

DATA = "movielens"
IMAGES = PROJECT_ROOT / "docs" / "images"
LARGEST_BYTES = 400_000
PATIENCE_S = 120.0
STILL_SHOTS = 4
NO_DITHER = Image.Dither.NONE
GRAPH_WINDOW = (4200, 2000)  # room for the whole lineage, made smaller afterwards
GRAPH_SCALE = 0.6
CHROMIUM_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--hide-scrollbars",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

# Local storage of Dagster's web UI: no invitation to its community, little navigation, and assets
# with what a reader of the README looks for.
UI_PREFERENCES: dict[str, JsonValue] = {
    "communityNux": "1",
    "dagster-nav-collapsed": True,
    "asset-graph-direction": "vertical",
    "asset-node-facets": ["checks", "latest-event", "kind-tag"],
}


def main() -> None:
    """Write every screenshot into docs/images.

    Raises:
        RecflowError: Chromium or the demonstration's results are missing, or a page never
            showed what it should.
    """
    deployment = find_deployment(DATA)
    last_day = deployment.settings.last_day
    assert last_day is not None
    report = ArtifactStore(deployment.settings.store_dir).get(REPORT, str(last_day))
    report_url = report.file("report.html").absolute().as_uri()
    IMAGES.mkdir(parents=True, exist_ok=True)
    with _browser() as page:
        page.show(report_url, 1280, 1500, until="document.querySelector('table')")
        page.save("report_wide.png")
        page.show(
            f"{report_url}#cost-content-only", 1280, 1900, until="document.querySelector('table')"
        )
        page.save("report_compression.png")
        page.show(report_url, 390, 844, scale=2, until="document.querySelector('table')")
        page.save("report_phone.png")
        with _web_ui(deployment) as url:
            _shoot_lineage(page, url)
            page.show(f"{url}/assets/evaluation/report", 1600, 1000, until=_shows("ndcg@10"))
            page.save("asset_details.png")


def _shoot_lineage(page: Page, url: str) -> None:
    page.prefer(UI_PREFERENCES)
    page.show(
        f"{url}/asset-groups",
        *GRAPH_WINDOW,
        until=_shows("Global asset lineage"),
        scale=GRAPH_SCALE,
    )
    sidebar = "document.querySelector('[aria-label=panel_show_right]')"
    page.wait(f"{sidebar} && document.querySelector('svg foreignObject')")
    page.run(f"{sidebar}.closest('button').click()")
    # Alt+E is the UI's shortcut for "Expand all groups".
    page.run(
        "document.dispatchEvent(new KeyboardEvent('keydown', "
        "{altKey: true, code: 'KeyE', bubbles: true}))"
    )
    page.wait(_shows("distilled_trimmed"))
    page.save("asset_graph.png")


def _shows(text: str) -> str:
    return f"document.body?.innerText.includes({json.dumps(text)})"


class Page:
    """A tab of Chromium."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._numbers = itertools.count(1)

    def show(self, url: str, width: int, height: int, *, until: str, scale: float = 1) -> None:
        """Open ``url`` in a window of ``width`` x ``height`` CSS pixels.

        Args:
            url: Address of the page.
            width: Width of the window.
            height: Height of the window.
            until: JavaScript expression that is truthy once the page can be photographed.
            scale: Device pixels per CSS pixel.
        """
        self._send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=False,
        )
        self._send("Page.navigate", url=url)
        self.wait(until)

    def wait(self, expression: str) -> None:
        """Wait until a JavaScript expression is truthy."""
        _patiently(lambda: self.run(f"!!({expression})"), f"the page to show {expression}")

    def run(self, expression: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self._send("Runtime.evaluate", expression=expression, returnByValue=True)
        return result["result"].get("value")

    def prefer(self, preferences: dict[str, JsonValue]) -> None:
        """Set entries of the local storage of every page opened from now on."""
        entries = [[key, json.dumps(value)] for key, value in preferences.items()]
        self._send("Page.enable")
        self._send(
            "Page.addScriptToEvaluateOnNewDocument",
            source=f"for (const e of {json.dumps(entries)}) localStorage.setItem(...e)",
        )

    def save(self, name: str) -> None:
        """Write what the window shows, once it has stopped changing, as a PNG with a palette.

        Raises:
            RecflowError: The file would be too large for a README.
        """
        image = Image.open(BytesIO(self._settled())).convert("RGB").quantize(256, dither=NO_DITHER)
        path = IMAGES / name
        image.save(path, optimize=True)
        size = path.stat().st_size
        if size > LARGEST_BYTES:
            raise RecflowError(f"{path} has {size} bytes; allowed: up to {LARGEST_BYTES}")
        print(f"{path.relative_to(PROJECT_ROOT)}  {image.width} x {image.height}, {size} bytes")

    def _settled(self) -> bytes:
        """Return the picture of a page that looked the same for some seconds."""
        history: list[bytes] = []

        def is_still() -> bool:
            time.sleep(1)
            shot = self._send("Page.captureScreenshot", format="png")["data"]
            history.append(base64.b64decode(shot))
            return len(history) >= STILL_SHOTS and len(set(history[-STILL_SHOTS:])) == 1

        _patiently(is_still, "the page to stop changing")
        return history[-1]

    def _send(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        self._connection.send(json.dumps(message))
        while True:  # events, which nobody here listens to, come in between
            answer = json.loads(self._connection.recv(timeout=PATIENCE_S))
            if answer.get("id") == number:
                if "error" in answer:
                    raise RecflowError(f"Chromium refused {method}: {answer['error']['message']}")
                return answer["result"]


@contextmanager
def _browser() -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        raise ConfigError("screenshots need Chromium; install it with: apt-get install chromium")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        port_file = Path(profile) / "DevToolsActivePort"
        command = [chromium, *CHROMIUM_FLAGS, "--remote-debugging-port=0"]
        with _process([*command, f"--user-data-dir={profile}", "about:blank"], "Chromium") as alive:
            _patiently(
                lambda: alive() and port_file.is_file() and "\n" in port_file.read_text(),
                "Chromium to start",
            )
            port = port_file.read_text().split()[0]
            tabs = json.loads(_fetch(f"http://127.0.0.1:{port}/json/list") or "[]")
            address = next(t["webSocketDebuggerUrl"] for t in tabs if t["type"] == "page")
            with connect(address, max_size=None, proxy=None) as connection:
                yield Page(connection)


@contextmanager
def _web_ui(deployment: Deployment) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "dagster_webserver", "-m", "recflow.definitions", "-p", port]
    with _process(command, "Dagster's web UI", deployment.environment()) as alive:
        _patiently(lambda: alive() and _fetch(f"{url}/server_info"), "Dagster's web UI to start")
        yield url


@contextmanager
def _process(
    command: Sequence[str], name: str, environment: dict[str, str] | None = None
) -> Iterator[Callable[[], bool]]:
    """Run a command in a session of its own, and end all of that session afterwards.

    Yields:
        A function that returns true, or raises once the command has ended by itself.
    """
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=PROJECT_ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def alive() -> bool:
        if process.poll() is not None:
            raise RecflowError(
                f"{name} ended with code {process.returncode}: {shlex.join(command)}"
            )
        return True

    try:
        yield alive
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        with suppress(ProcessLookupError):  # children that outlived the first signal
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _patiently(attempt: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not attempt():
        if time.monotonic() > deadline:
            raise RecflowError(f"waited {PATIENCE_S:.0f} s for {what}")
        time.sleep(0.2)


def _fetch(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:  # noqa: S310 - our own server
            return response.read()
    except urllib.error.URLError:
        return None


if __name__ == "__main__":
    try:
        main()
    except RecflowError as error:
        sys.exit(f"Error: {error}")
