"""A Hub on loopback: what the real client asks for, answered from folders."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves ``root/org/name`` as repositories; ``gated`` ones show their file list and refuse their files.

    Ranges are answered unless `ranges` says no; `ranged` counts their bytes.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.gated: set[str] = set()
        self.requests: list[str] = []
        self.tokens: set[str | None] = set()
        self.ranges = True
        self.ranged = 0

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.requests.append(f"{method} {path}")
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if parts[:2] == ["api", "models"]:
            return self._info("/".join(parts[2:4]), parts[5] if parts[4:5] == ["revision"] else "main")
        if parts[2:3] == ["resolve"]:
            return self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        return 404, {}, b""

    def _missing(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes] | None:
        if not (self.root / repo).is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        if revision not in {"main", "v1", COMMIT}:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        return None

    def _info(self, repo: str, revision: str) -> tuple[int, dict[str, str], bytes]:
        missing = self._missing(repo, revision)
        if missing:
            return missing
        files = [file.name for file in sorted((self.root / repo).iterdir())]
        info: dict[str, Any] = {"id": repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()

    def _file(self, repo: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        missing = self._missing(repo, revision)
        if missing:
            return missing
        if repo in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        file = self.root / repo / name
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        content = file.read_bytes()
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}, content


@contextmanager
def serve(hub: Hub) -> Iterator[str]:
    """Serve a hub on a free loopback port; yields the endpoint."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _reply(self, method: str) -> None:
            hub.tokens.add(self.headers.get("Authorization"))
            status, headers, body = hub.answer(method, self.path)
            wanted = self.headers.get("Range")
            if status == 200 and wanted and method == "GET":
                start, last = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
                headers = {**headers, "Content-Range": f"bytes {start}-{min(last, len(body) - 1)}/{len(body)}"}
                status, body = (206 if hub.ranges else 200), body[start : last + 1] if hub.ranges else body
                hub.ranged += len(body)
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if method == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            self._reply("GET")

        def do_HEAD(self) -> None:
            self._reply("HEAD")

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the library's name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
