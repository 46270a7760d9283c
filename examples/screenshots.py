"""Opens TensorBoard's pages, and the page of an analysis, in a headless Chromium, and keeps pictures of them.

``python examples/screenshots.py --logdir examples/.cache/logs --report my-report/report.html --output pictures``

Wants ``chromium`` and ``chromedriver``, as Debian's packages ``chromium`` and ``chromium-driver`` bring them.
"""

import argparse
import base64
import json
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

PAGES = {"scalars": "timeseries", "custom_scalars": "custom_scalars", "images": "images", "text": "text"}
WIDTHS = {"desktop": 1400, "phone": 390}
# Chromium's own calls home would be refused, many at a time, on a machine without a network
ARGUMENTS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


class Browser:
    """A headless Chromium, driven through ChromeDriver's own protocol.

    Args:
        port: where ChromeDriver listens.
        profile: an empty directory.
    """

    def __init__(self, port: int, profile: str) -> None:
        self._root = f"http://127.0.0.1:{port}"
        options = {"args": [*ARGUMENTS, f"--user-data-dir={profile}"], "binary": _program("chromium")}
        made = self._post("/session", {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}})
        self._root += f"/session/{made['sessionId']}"

    def run(self, script: str) -> Any:
        """Runs JavaScript in the page and returns what it returns."""
        return self._post("/execute/sync", {"script": script, "args": []})

    def open(self, url: str, width: int, height: int = 900) -> None:
        """Opens a page in a window of this size."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self._cdp("Emulation.setDeviceMetricsOverride", size)
        self._post("/url", {"url": url})

    def picture(self, path: Path, *, whole: bool = False) -> None:
        """Writes what the window shows, or the whole page, as a PNG."""
        taken = self._cdp("Page.captureScreenshot", {"format": "png", "captureBeyondViewport": whole})
        path.write_bytes(base64.b64decode(taken["data"]))

    def close(self) -> None:
        """Ends the browser."""
        with suppress(OSError):
            urllib.request.urlopen(urllib.request.Request(self._root, method="DELETE"), timeout=20).close()

    def _cdp(self, command: str, parameters: dict[str, Any]) -> Any:
        return self._post("/goog/cdp/execute", {"cmd": command, "params": parameters})

    def _post(self, path: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(self._root + path, json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=120) as answer:
            return json.load(answer)["value"]


@contextmanager
def browser() -> Iterator[Browser]:
    """Starts ChromeDriver and a browser, and ends both."""
    port = _free_port()
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        _process([_program("chromedriver"), f"--port={port}"], port),
    ):
        made = Browser(port, profile)
        try:
            yield made
        finally:
            made.close()


@contextmanager
def tensorboard(logdir: Path) -> Iterator[str]:
    """Starts TensorBoard on a directory of logs; yields its address."""
    port = _free_port()
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(logdir), "--port", str(port)]
    with _process([*command, "--load_fast=false", "--reload_interval=2"], port):
        yield f"http://127.0.0.1:{port}"


def picture_tensorboard(logdir: Path, output: Path) -> list[Path]:
    """Writes a picture of each of TensorBoard's pages.

    Args:
        logdir: with event files.
        output: a directory.
    """
    made = []
    with tensorboard(logdir) as address, browser() as window:
        for name, page in PAGES.items():
            window.open(f"{address}/#{page}", WIDTHS["desktop"], 1500)
            # charts and pictures are fetched and drawn one after the other
            time.sleep(8)
            window.picture(output / f"tensorboard_{name}.png")
            made.append(output / f"tensorboard_{name}.png")
    return made


def picture_report(report: Path, output: Path) -> list[Path]:
    """Writes a picture of the whole page of an analysis at the width of a desktop and of a phone.

    Args:
        report: the HTML file.
        output: a directory.

    Raises:
        ValueError: if the page is wider than the window, so that a reader would have to scroll sideways.
    """
    made = []
    with browser() as window:
        for name, width in WIDTHS.items():
            window.open(report.resolve().as_uri(), width)
            time.sleep(1)
            wide = int(window.run("return document.documentElement.scrollWidth"))
            if wide > width:
                raise ValueError(f"{report}: the page is {wide} pixels wide in a window of {width}.")
            window.picture(output / f"report_{name}.png", whole=True)
            made.append(output / f"report_{name}.png")
    return made


@contextmanager
def _process(command: list[str], port: int) -> Iterator[None]:
    # until it listens, and no longer than needed
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(300):
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
                break
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode} before it listened.")
            time.sleep(0.2)
        else:
            raise RuntimeError(f"{command[0]} does not listen on port {port} after a minute.")
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise SystemExit(f"{name} is not on the path. On Debian: apt-get install chromium chromium-driver")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--logdir", type=Path, help="logs that TensorBoard shows")
    parser.add_argument("--report", type=Path, help="page that lightning-moe analyze wrote")
    parser.add_argument("--output", type=Path, required=True, help="directory for the pictures")
    args = parser.parse_args()
    if args.logdir is None and args.report is None:
        parser.error("nothing to open: give --logdir, --report, or both")
    args.output.mkdir(parents=True, exist_ok=True)
    made = [] if args.logdir is None else picture_tensorboard(args.logdir, args.output)
    made += [] if args.report is None else picture_report(args.report, args.output)
    print("\n".join(map(str, made)))


if __name__ == "__main__":
    main()
