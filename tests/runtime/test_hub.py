"""Bundles on a hub: the real client against a small hub on the loopback interface."""

from __future__ import annotations

import base64
import hashlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Hub(BaseHTTPRequestHandler):
    """The routes of a hub that publishing and fetching a small repository use."""

    files: ClassVar[dict[str, bytes]] = {}
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, content: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, content: object) -> None:
        self._answer(json.dumps(content).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        url = f"http://{self.headers['Host']}"
        if self.path == "/api/repos/create":
            self._json({"url": f"{url}/me/desk"})
        elif self.path.startswith("/api/models/me/desk/preupload/"):
            asked = json.loads(body)["files"]
            self._json(
                {
                    "files": [
                        {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in asked
                    ]
                }
            )
        elif self.path.startswith("/api/models/me/desk/commit/"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self._json({"commitUrl": f"{url}/me/desk/commit/{COMMIT}", "commitOid": COMMIT})
        else:
            self._json({})

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path.startswith("/api/models/me/desk/tree/"):  # huggingface_hub from version 1 on
            self._json(
                [
                    {
                        "type": "file",
                        "path": name,
                        "size": len(content),
                        "oid": hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest(),
                    }
                    for name, content in self.files.items()
                ]
            )
            return
        if path.startswith("/api/models/me/desk"):
            siblings = [{"rfilename": name} for name in self.files]
            self._json(
                {
                    "id": "me/desk",
                    "modelId": "me/desk",
                    "sha": COMMIT,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                }
            )
            return
        name = path.partition(f"/me/desk/resolve/{COMMIT}/")[2]
        if name not in self.files:
            self._answer(b"", 404, X_Error_Code="RepoNotFound")
            return
        content = self.files[name]
        self._answer(content, ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)

    do_HEAD = do_GET


@pytest.fixture
def hub() -> Iterator[str]:
    _Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def _python(code: str, tmp_path: Path, endpoint: str, *arguments: str, offline: bool = False) -> str:
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(tmp_path / "home"),
        "HF_ENDPOINT": endpoint,
        "HF_HUB_OFFLINE": "1" if offline else "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_not_a_secret",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", code, *arguments],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_published_bundle_comes_back_and_answers_the_same(
    tiny_bundle: Path, tmp_path: Path, hub: str
) -> None:
    publish = (
        "import sys; from sbs_edge import Student\n"
        "print(Student.from_pretrained(sys.argv[1]).push_to_hub('me/desk', private=True, token='hf_not_a_secret'))"
    )
    assert _python(publish, tmp_path, hub, str(tiny_bundle)).endswith(f"/commit/{COMMIT}")
    listed = json.loads((tiny_bundle / "manifest.json").read_text())["files"]
    assert set(listed) < set(_Hub.files)
    _Hub.files[".gitattributes"] = b"*.bin filter=lfs\n"  # a hub adds files of its own
    ask = (
        "import sys; from sbs_edge import Student\n"
        "a = Student.from_pretrained(sys.argv[1]).predict('the coil is frosted .'); print(a.label, a.probabilities)"
    )
    here = _python(ask, tmp_path, hub, str(tiny_bundle))
    assert _python(ask, tmp_path, hub, "me/desk") == here
    assert _python(ask, tmp_path, hub, "me/desk", offline=True) == here  # from the cache


def test_a_name_that_no_hub_has_is_one_sentence(tmp_path: Path, hub: str) -> None:
    code = (
        "from sbs_edge.errors import SbsEdgeError; from sbs_edge.runtime.hub import fetch\n"
        "for name in ('me/missing', 'desk', './me/desk', 'me/desk--old', 'me/..', 'me/desk.git', 'me/desk/1'):\n"
        "    try: fetch(name)\n"
        "    except SbsEdgeError as error: print(type(error).__name__, error)"
    )
    first, *others = _python(code, tmp_path, hub).splitlines()
    assert first.startswith(
        "SbsEdgeError There is no directory 'me/missing', and the hub answered 404 for me/missing."
    )
    assert len(others) == 6
    assert all(
        line.startswith("UsageError") and "neither a directory nor a hub name" in line for line in others
    )


def test_a_damaged_bundle_is_neither_published_nor_kept_from_a_hub(
    own_bundle: Path, tmp_path: Path, hub: str
) -> None:
    code = (
        "import sys; from pathlib import Path; from sbs_edge import IntegrityError, Student\n"
        "from sbs_edge.runtime.hub import upload\n"
        "try: upload(Path(sys.argv[1]), 'me/desk') if sys.argv[2] == 'push' else Student.from_pretrained('me/desk')\n"
        "except IntegrityError as error: print(error)\n"
        "else: print('done')"
    )
    assert _python(code, tmp_path, hub, str(own_bundle), "push") == "done"
    whole = dict(_Hub.files)
    graph = own_bundle / "cpu-fp32" / "label_scorer.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    _Hub.files.clear()
    assert "does not have the digest" in _python(code, tmp_path, hub, str(own_bundle), "push")
    assert _Hub.files == {}
    _Hub.files.update(whole)
    _Hub.files["cpu-fp32/label_scorer.onnx"] = graph.read_bytes()
    assert "does not have the digest" in _python(code, tmp_path, hub, str(own_bundle), "fetch")
    assert not list((tmp_path / "home").glob(".cache/sbs-edge/hub/*/*"))
