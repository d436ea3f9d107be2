"""A headless Chromium, driven over its DevTools websocket, for tests of pages."""

import asyncio
import base64
import contextlib
import functools
import itertools
import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
]
PATIENCE_S = 60.0
KEY_CODES = {"Tab": 9, "Enter": 13, "Escape": 27, "ArrowLeft": 37, "ArrowRight": 39}

# Measures in the page: texts with too little contrast, elements wider than the window, images that did not load.
MEASURE = """(() => {
  const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parse = s => { const m = s.match(/[\\d.]+/g).map(Number); return m.length < 4 ? [...m, 1] : m; };
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.99) return c;
    }
    return [255, 255, 255, 1];
  };
  const faint = [], texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let count = 0;
  while (texts.nextNode()) {
    const e = texts.currentNode.parentElement, text = texts.currentNode.data.trim();
    if (!text || !e.checkVisibility() || ['STYLE', 'TITLE'].includes(e.tagName)) continue;
    count += 1;
    const style = getComputedStyle(e), a = light(parse(style.color)), b = light(behind(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push([text.slice(0, 40), Math.round(ratio * 100) / 100]);
  }
  const images = [...document.images];
  return {
    faint, texts: count, images: images.length,
    broken: images.filter(i => !i.complete || i.naturalWidth === 0).length,
    nameless: images.filter(i => !i.alt.trim()).length,
    overflow: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    small: [...document.querySelectorAll('p, li, td, th, dd')].filter(
      e => e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 12).length,
    headings: [...document.querySelectorAll('h1, h2, h3, h4')].map(h => Number(h.tagName[1])),
    headless: [...document.querySelectorAll('table')].filter(
      t => !t.querySelector('th[scope=col]') || !t.caption).length,
    scripts: document.scripts.length,
  };
})()"""


def chromium() -> str | None:
    """Returns the path of a browser, or None if there is none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@dataclass
class Seen:
    """A page as it was shown."""

    measured: dict[str, Any]
    complaints: list[str]  # errors of the console, exceptions, requests that failed
    requests: list[str]  # of other addresses than the page and data:


@dataclass
class Used:
    """The values that were read of a page while it was used, and what its console said."""

    values: list[Any]
    complaints: list[str]


# Reads an expression, presses a key, or clicks on the first element that a selector finds.
Action = tuple[Literal["read", "press", "click"], str]


@dataclass
class _Tab:
    socket: aiohttp.ClientWebSocketResponse
    numbers: Any = field(default_factory=lambda: itertools.count(1))
    events: list[dict[str, Any]] = field(default_factory=list)

    async def do(self, method: str, **params: Any) -> dict[str, Any]:
        number = next(self.numbers)
        await self.socket.send_json({"id": number, "method": method, "params": params})
        while True:
            answer = await asyncio.wait_for(self.socket.receive_json(), PATIENCE_S)
            if answer.get("id") == number:
                assert "error" not in answer, answer
                return dict(answer["result"])
            self.events.append(answer)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, which may be a promise."""
        found = await self.do("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def press(self, key: str) -> None:
        code = KEY_CODES.get(key, 0)
        text = {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.do("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)
            text = {}

    async def click(self, selector: str) -> None:
        """Clicks in the middle of the first element that matches, scrolled into view."""
        x, y = await self.evaluate(
            f"""(() => {{ const e = document.querySelector({json.dumps(selector)});
            e.scrollIntoView({{block: 'center', behavior: 'instant'}});
            const r = e.getBoundingClientRect(); return [r.x + r.width / 2, r.y + r.height / 2]; }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.do("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    async def wait_for(self, method: str) -> None:
        while not any(event["method"] == method for event in self.events):
            self.events.append(await asyncio.wait_for(self.socket.receive_json(), PATIENCE_S))


class _Browser:
    """A browser of this process. Pages are opened in tabs of their own: to start one takes seconds."""

    def __init__(self) -> None:
        path = chromium()
        assert path is not None
        self.folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        self.process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={self.folder.name}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @contextlib.asynccontextmanager
    async def open_tab(self) -> AsyncIterator[str]:
        """The address of a new tab, which is closed afterwards."""
        port = await _port(Path(self.folder.name) / "DevToolsActivePort", self.process)
        async with aiohttp.ClientSession() as session:
            async with session.put(f"http://127.0.0.1:{port}/json/new?about:blank") as answer:
                tab = json.loads(await answer.text())
            try:
                yield tab["webSocketDebuggerUrl"]
            finally:
                async with session.get(f"http://127.0.0.1:{port}/json/close/{tab['id']}"):
                    pass

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.folder.cleanup()


@functools.cache
def _shared_browser() -> _Browser:
    return _Browser()


def close_browser() -> None:
    """Ends the browser of this process, if one was started."""
    if _shared_browser.cache_info().currsize:
        _shared_browser().close()
        _shared_browser.cache_clear()


async def _port(file: Path, process: subprocess.Popen[bytes]) -> int:
    for _ in range(int(PATIENCE_S / 0.1)):
        assert process.poll() is None, "the browser ended"
        with contextlib.suppress(OSError, ValueError, IndexError):
            return int(file.read_text().splitlines()[0])
        await asyncio.sleep(0.1)
    raise TimeoutError("the browser does not answer")


@contextlib.asynccontextmanager
async def _open_page(file: Path, width: int, scheme: Literal["light", "dark"], scripted: bool) -> AsyncIterator[_Tab]:
    """The page in a new tab, with all its pictures decoded."""
    async with (
        _shared_browser().open_tab() as address,
        aiohttp.ClientSession() as session,
        session.ws_connect(address, max_msg_size=0) as socket,
    ):
        tab = _Tab(socket)
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.do(f"{domain}.enable")
        await tab.do("Emulation.setScriptExecutionDisabled", value=not scripted)
        await tab.do(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600
        )
        await tab.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await tab.do("Page.navigate", url=file.resolve().as_uri())
        await tab.wait_for("Page.loadEventFired")
        await tab.evaluate("Promise.all([...document.images].map(i => i.decode().catch(() => 0))).then(() => 0)")
        yield tab


async def _look(file: Path, width: int, scheme: Literal["light", "dark"], picture: Path | None, scripted: bool) -> Seen:
    async with _open_page(file, width, scheme, scripted) as tab:
        await tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        found = await tab.evaluate(MEASURE)
        if picture is not None:
            await tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
            shot = await tab.do("Page.captureScreenshot", format="png", captureBeyondViewport=True)
            picture.write_bytes(base64.b64decode(shot["data"]))
        return Seen(found, _complaints(tab.events), _requests(tab.events, file))


async def _use(file: Path, width: int, actions: Sequence[Action], picture: Path | None) -> Used:
    async with _open_page(file, width, "light", True) as tab:
        values = []
        for kind, what in actions:
            if kind == "read":
                values.append(await tab.evaluate(what))
            elif kind == "press":
                await tab.press(what)
            else:
                await tab.click(what)
        if picture is not None:
            shot = await tab.do("Page.captureScreenshot", format="png")
            picture.write_bytes(base64.b64decode(shot["data"]))
        return Used(values, _complaints(tab.events))


def _complaints(events: list[dict[str, Any]]) -> list[str]:
    found = []
    for event in events:
        method, params = event["method"], event["params"]
        if method == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
            found.append(params["entry"]["text"])
        if method == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
            found.append(str(params["args"]))
        if method in ("Runtime.exceptionThrown", "Network.loadingFailed"):
            found.append(json.dumps(params)[:300])
    return found


def _requests(events: list[dict[str, Any]], file: Path) -> list[str]:
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return [url for url in asked if not url.startswith("data:") and url != file.resolve().as_uri()]


def look(
    file: Path, width: int, scheme: Literal["light", "dark"], picture: Path | None = None, scripted: bool = True
) -> Seen:
    """Opens the page in a new tab, `width` pixels wide, and measures it with everything unfolded.

    `picture`: the file of a screenshot with everything folded. `scripted`: whether the page may run its script.
    """
    return asyncio.run(_look(file, width, scheme, picture, scripted))


def use(file: Path, width: int, actions: Sequence[Action], picture: Path | None = None) -> Used:
    """Opens the page in a new tab, `width` pixels wide, and does the actions, with real keys and clicks.

    `picture`: the file of a screenshot of the window afterwards.
    """
    return asyncio.run(_use(file, width, actions, picture))
