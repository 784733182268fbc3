"""The page, read by a real browser: answers, rationales, errors and a busy server; nothing from elsewhere."""

from __future__ import annotations

import asyncio
import html.parser
import re
import shutil
import socket
import subprocess

import httpx
import pytest

from sbs_edge.runtime.student import Student


@pytest.fixture
def browse(tmp_path):
    """Open a URL in headless Chromium, let the page finish, return its DOM as HTML and its console."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium on this machine; apt-get install chromium to run this test")

    def open_page(url, **query):
        done = subprocess.run(
            [
                browser, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
                "--enable-logging=stderr", "--allow-file-access-from-files",
                f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000",
                "--dump-dom", f"{url}/?{httpx.QueryParams(query)}" if query else url,
            ],
            capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return done.stdout, console

    return open_page


def status_of(dom):
    found = re.search(r'<div id="status"([^>]*)>([^<]*)</div>', dom)
    assert found, dom[-3000:]
    return "error" if 'class="error"' in found.group(1) else "", found.group(2)


def test_it_shows_answers_and_rationales(browse, server, bundles, texts):
    dom, console = browse(server.url, text=texts[1], model="desk", explain="1")
    with Student.load(bundles["closed"]) as student:
        want, why = student.predict([texts[1]])[0], student.explain([texts[1]])[0]
    assert f"<td>{want.label}</td>" in dom, dom[-3000:]
    assert f"{want.probability:.3f}</td>" in dom
    assert f"<td>{why.rationale}</td>" in dom
    assert status_of(dom)[1].startswith("Answered by desk, version 1, in ")
    assert console == []  # the policy of the page blocks nothing it needs


def test_it_shows_what_was_wrong(browse, server, texts):
    dom, _ = browse(server.url, text=texts[1], model="desk", labels="wait,close")
    assert status_of(dom) == ("error", "This model has its own labels: leave labels out.")
    dom, _ = browse(server.url, text="<b>bold</b>", model="<img src=x onerror=alert(1)>")
    assert status_of(dom) == ("error", "There is no model of that name here; there are: choose, desk.")
    assert "<img" not in dom.replace("&lt;img", "")


def test_it_shows_that_the_server_is_busy(browse, serve_process, bundles, texts):
    busy = serve_process(bundles["closed"], "--max-concurrent", "1", "--body-timeout-s", "60")
    host, port = busy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as holder:
        holder.sendall(b"POST /v1/predict HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n")
        while "sbs_edge_requests_in_flight 1.0" not in httpx.get(f"{busy.url}/metrics").text:
            pass
        dom, _ = browse(busy.url, text=texts[0])
    kind, text = status_of(dom)
    assert kind == "error"
    assert re.fullmatch(r"The server is at its limit of queued work; try again in \d+ s\.", text)


FRAME = """<body style="margin:0"><iframe id="page" style="width:390px;height:800px;border:0" src="page.html?{query}">
</iframe><output></output><script>setTimeout(async () => {{
 const inside = document.getElementById("page").contentWindow, root = inside.document.documentElement;
 document.querySelector("output").textContent = await (async () => {{ {script} }})();
}}, 3000)</script>"""
# The server's part: answers, then whatever `inside.failing` says; a rationale tells what was asked.
ANSWERED = """"use strict"; window.fetch = async (url, asked) => window.failing
 ? { ok: false, json: async () => ({ error: "no" }) }
 : { ok: true, json: async () => ({ model: "m", version: "1", predictions: JSON.parse(asked.body).texts.map(() => (
     { label: "adjust", probability: 0.5, rationale: JSON.parse(asked.body).explain + "y".repeat(300) })) }) };"""


@pytest.fixture
def framed(browse, repository, tmp_path):
    """Show the page in a frame of 390 px and return what a script finds in it."""

    def show(query, script):
        page = (repository / "sbs_edge" / "serve" / "page.html").read_text()
        (tmp_path / "page.html").write_text(page.replace('"use strict";', ANSWERED))
        (tmp_path / "index.html").write_text(FRAME.format(query=query, script=script))
        dom, _ = browse(f"file://{tmp_path}/index.html")
        found = re.search(r"<output>(.*?)</output>", dom)
        assert found, dom[-500:]
        return found[1]

    return show


def test_it_fits_a_telephone(framed):
    """At 390 px nothing is wider than the window, a word of 300 letters neither."""
    script = "return root.scrollWidth + ' of ' + root.clientWidth"
    wide, window = framed(f"text=a+b&text={'x' * 300}", script).split(" of ")
    assert int(wide) <= int(window)


@pytest.mark.parametrize(
    ("given", "asked"), [("explain=1", "true"), ("explain", "true"), ("explain=0", "false"), ("x=1", "false")]
)
def test_explain_in_the_address_follows_its_value(framed, given, asked):
    script = "return inside.document.querySelector('tbody').rows[0].cells[3].textContent.replace(/y+/, '')"
    assert framed(f"text=a&{given}", script) == asked


def test_an_error_takes_the_old_answers_away(framed):
    look = "const table = inside.document.getElementById('answers'); const seen = () => table.hidden + ' ' + "
    look += "table.tBodies[0].rows.length; const before = seen(); inside.failing = true; "
    look += "await inside.predict(); return before + ', ' + seen()"
    assert framed("text=a", look) == "false 1, true 0"


class References(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.outside: list[str] = []

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name.startswith("on") or name == "style":
                self.outside.append(f"{tag} {name}")
            if name in ("src", "href", "action", "data", "poster", "srcset"):
                self.outside.append(f"{tag} {value}")


def test_it_loads_nothing_and_may_load_nothing(hand_bundle, running):
    async def go():
        async with running(hand_bundle) as app:
            return await app.client.get("/")

    answer = asyncio.run(go())
    checker = References()
    checker.feed(answer.text)
    assert checker.outside == ["a openapi.json"]  # a link, not a resource
    assert not re.search(r"url\(|@import|https?://|//[a-z]", answer.text)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert (policy["base-uri"], policy["form-action"], policy["frame-ancestors"]) == ("'none'",) * 3
    for name in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[name])
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
