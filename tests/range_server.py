"""A real HTTP server of a folder, with byte ranges, that fails when it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote

SOUND, ERROR, FORBIDDEN, STALL = "sound", "error", "forbidden", "stall"
TRUNCATE = "truncate"  # fewer bytes than the head of the answer says
SHORT, SPOILED = "short", "spoiled"  # fewer bytes, or other ones, in an answer that is sound
WHOLE = "whole"  # byte ranges are ignored
REDIRECT = "redirect"  # to a URL with a signature


class Request(NamedTuple):
    """What was asked: a file's path in the folder, the first byte, and how often that had been asked before."""

    name: str
    start: int
    before: int


class Server(ThreadingHTTPServer):
    """Serves `folder`; `fault` says for each request how it is answered."""

    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.fault: Callable[[Request], str] = lambda request: SOUND
        self.requests: list[Request] = []
        self.lock = threading.Lock()
        self.ended = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, name: str, start: int) -> str:
        """Note a request down and say how it is answered."""
        with self.lock:
            before = sum(known.name == name and known.start == start for known in self.requests)
            request = Request(name, start, before)
            self.requests.append(request)
        return self.fault(request)


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = unquote(self.path).lstrip("/")
        asked = self.headers.get("Range")
        start, _, last = asked.removeprefix("bytes=").partition("-") if asked else ("0", "", "")
        answer = self.server.answer(name, int(start))
        if answer == STALL:
            self.server.ended.wait(60)
            return
        if answer in (ERROR, FORBIDDEN):
            self.send_error(500 if answer == ERROR else 403)
            return
        if answer == REDIRECT:
            self.send_response(302)
            self.send_header("Location", f"/{name}?signature=SECRET")
            self.end_headers()
            return
        path = self.server.folder / name
        if not path.is_file():
            self.send_error(404)
            return
        data = path.read_bytes()
        if asked and int(start) >= len(data):
            self.send_error(416)
            return
        if asked and answer != WHOLE:
            data = data[int(start) : int(last) + 1 if last else None]
        if answer in (SHORT, SPOILED):
            data = data[: len(data) // 2] if answer == SHORT else bytes(len(data))
        self.send_response(206 if asked and answer != WHOLE else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if answer == TRUNCATE else data)

    def log_message(self, format: str, *args: object) -> None:
        """Quiet."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    """A server that runs while the block does."""
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
