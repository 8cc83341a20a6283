"""As much of the Hugging Face hub as a download needs, on a loopback port: no hub is reached from a test."""

from __future__ import annotations

import json
import threading
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

SHA = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """`files` of `owner/name`; `refusals` maps a repository to (status, the hub's X-Error-Code)."""

    files: dict[str, dict[str, bytes]] = field(default_factory=dict[str, dict[str, bytes]])
    refusals: dict[str, tuple[int, str]] = field(default_factory=dict[str, tuple[int, str]])
    sizes: dict[str, int] = field(default_factory=dict[str, int])  # lies about a file's size
    tokens: list[str] = field(default_factory=list[str])  # Authorization headers that came
    downloaded: list[str] = field(default_factory=list[str])
    url: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        parts = urlparse(path).path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name, rest = ("/".join(parts[2:4]), parts[4:]) if api else ("/".join(parts[:2]), parts[2:])
        if name in self.refusals:
            status, code = self.refusals[name]
            return status, {"X-Error-Code": code}, b"{}"
        files = self.files.get(name)
        if files is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if len(rest) > 1 and rest[1] not in {SHA, "main"}:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if not api:
            body = files["/".join(rest[2:])]
            return 200, {"ETag": f'"{hash(body) & 0xFFFF:040x}"', "X-Repo-Commit": SHA}, body
        sized = {file: self.sizes.get(file, len(body)) for file, body in files.items()}
        if rest[:1] == ["tree"]:
            tree = [{"type": "file", "path": file, "size": size, "oid": "0" * 40} for file, size in sized.items()]
            return 200, {}, json.dumps(tree).encode()
        siblings = [{"rfilename": file, "size": size} for file, size in sized.items()]
        return 200, {}, json.dumps({"id": name, "modelId": name, "sha": SHA, "siblings": siblings}).encode()


@contextmanager
def running_hub() -> Generator[Hub, None, None]:
    """A hub until the block's end; `url` is its HF_ENDPOINT."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if "agent-harnesses" not in self.path:  # the library's own question, once a process
                hub.tokens.append(self.headers.get("Authorization", ""))
            status, headers, body = hub.answer(self.path)
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)
                if "/resolve/" in self.path:
                    hub.downloaded.append(self.path.rpartition("/")[2])

        do_HEAD = do_GET  # noqa: N815  # the base class looks for it

        def log_message(self, format: str, *args: object) -> None:
            """Quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
