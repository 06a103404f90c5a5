"""An S3 server on loopback (moto's) that misbehaves as it is told."""

import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

CHUNK_BYTES = 1000


@dataclass
class FaultyStore:
    """WSGI application around the server's own."""

    application: Callable[..., Iterable[bytes]]
    faults: list[tuple[str, str]] = field(default_factory=list)
    """(pattern of the path, fault): the first that fits a download is used once."""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """(path, fault or "") of every download."""
    hang_seconds: float = 5.0
    released: threading.Event = field(default_factory=threading.Event)
    """Ends what hangs."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if environ["REQUEST_METHOD"] != "GET":
            return self.application(environ, start_response)
        index = next((i for i, (pattern, _) in enumerate(self.faults) if re.search(pattern, path)), None)
        fault = "" if index is None else self.faults.pop(index)[1]
        self.seen.append((path, fault))
        if fault in ("500", "503"):
            start_response(f"{fault} Injected", [("Content-Length", "0")])
            return []
        if fault == "hang":
            self.released.wait(self.hang_seconds)
        body = self.application(environ, start_response)
        if fault == "slow":
            return self._pieces(body, seconds=0.02)
        if fault == "truncated":
            return self._pieces(body, keep_bytes=CHUNK_BYTES)
        return body

    @staticmethod
    def _pieces(body: Iterable[bytes], seconds: float = 0.0, keep_bytes: int | None = None) -> Iterator[bytes]:
        """Send the body in small pieces, or only its beginning although the header promises all of it."""
        content = b"".join(body)[:keep_bytes]
        for start in range(0, len(content), CHUNK_BYTES):
            time.sleep(seconds)
            yield content[start : start + CHUNK_BYTES]


@contextmanager
def serve() -> Iterator[tuple[str, FaultyStore]]:
    """Give the endpoint's URL and the store behind it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import make_server

    store = FaultyStore(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, store, threaded=True)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    # Its first answer loads the service, which on a busy machine takes longer than clients are patient.
    urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/moto-api/data.json", timeout=120).close()
    try:
        yield f"http://127.0.0.1:{server.server_port}", store
    finally:
        server.shutdown()
        thread.join(10)
