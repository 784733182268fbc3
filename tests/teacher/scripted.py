"""A scripted server of the OpenAI protocol on loopback; each test says what it answers."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = "The buyer asks for money back. So the answer is refund."
TASK = {
    "name": "shop",
    "instruction": "Say what the shop has to do.",
    "label_kind": "closed",
    "labels": ["refund", "follow-up"],
}


def body(content=GOOD, finish="stop", **message):
    return {
        "choices": [
            {"finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
        ],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }


class Scripted:
    """A server on loopback: ``reply(request, hit)`` gives (status, content, headers)."""

    def __init__(self):
        self.reply = lambda request, hit: (200, body(), {})
        self.requests: list[dict] = []
        self.paths: list[str] = []
        self.headers: list[dict] = []
        outer, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with lock:
                    outer.requests.append(request)
                    outer.paths.append(self.path)
                    outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                    hit = len(outer.requests)
                status, content, headers = outer.reply(request, hit)
                payload = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"content-length": str(len(payload)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(payload)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a run that stops closes its connections
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
