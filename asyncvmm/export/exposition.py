"""Exposition: metrics as text, in a file or over HTTP. The text is prometheus-client's."""

from __future__ import annotations

import errno
import os
import socket
import stat
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from asyncvmm.errors import ConfigError
from asyncvmm.whole_file import replace_file

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

PATIENCE_S = 10.0
"""Seconds a client may keep us waiting for its next bytes."""

MAX_CLIENTS = 32
"""Clients that are answered at a time; more than these are turned away."""


def exposition(registry: CollectorRegistry, target: str) -> bytes:
    """The metrics as text: OpenMetrics; for a ``target`` that ends in ``.prom`` Prometheus's own text format.

    The latter is what node_exporter's textfile collector reads, which wants files of that name.
    """
    if target.endswith(".prom"):
        from prometheus_client.exposition import generate_latest as prometheus_text

        return prometheus_text(registry)
    from prometheus_client.openmetrics.exposition import generate_latest as openmetrics_text

    text: bytes = openmetrics_text(registry)  # type: ignore[no-untyped-call]
    return text


def check_target(target: str, sources: Sequence[str] = ()) -> None:
    """See that ``target`` can be written and is none of ``sources``. Raises ConfigError if not."""
    if target == "-":
        return
    path = Path(target)
    try:
        there = path.stat()
    except FileNotFoundError:
        there = None
    except (OSError, ValueError) as error:
        raise _unwritable(target, error) from None
    if there is not None and not stat.S_ISREG(there.st_mode):
        raise ConfigError("--prometheus", expected="a file or -", found=f"{target}, which is no file")
    if there is not None and any(_is(there, source) for source in sources if source != "-"):
        raise ConfigError("--prometheus", expected="a file that is none of those read", found=target)
    if not path.resolve().parent.is_dir():
        raise ConfigError("--prometheus", expected="a directory to write in", found=str(path.parent))


def _is(there: os.stat_result, source: str) -> bool:
    try:
        return os.path.samestat(there, os.stat(source))
    except (OSError, ValueError):
        return False  # that it cannot be read is told when it is


def write_metrics(registry: CollectorRegistry, target: str) -> None:
    """Write the metrics to a file, which at every moment is the old one or the new one whole; ``-`` is stdout.

    Raises ConfigError if it cannot be written, BrokenPipeError if stdout's reader is gone.
    """
    text = exposition(registry, target)
    if target == "-":
        sys.stdout.buffer.write(text)
        sys.stdout.buffer.flush()
        return
    check_target(target)
    try:
        replace_file(Path(target).resolve(), text)
    except OSError as error:
        raise _unwritable(target, error) from None


def _unwritable(target: str, error: Exception) -> ConfigError:
    why = getattr(error, "strerror", None) or str(error)
    return ConfigError("--prometheus", expected="a file that can be written", found=f"{target} ({why})")


def parse_address(address: str) -> tuple[str, int]:
    """Host and port of ``HOST:PORT`` or ``[V6]:PORT``. Raises ConfigError."""
    host, colon, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    host = host[1:-1] if bracketed else host
    digits = port.isascii() and port.isdigit() and len(port) <= 5
    if not colon or not host or not digits or int(port) > 65535 or (":" in host and not bracketed):
        raise ConfigError("--listen", expected="HOST:PORT or [V6]:PORT", found=repr(address))
    return host, int(port)


@contextmanager
def serving(registry: CollectorRegistry, address: str) -> Iterator[str]:
    """Answer HTTP requests for the metrics meanwhile, on threads; gives the URL. Port 0 takes any that is free.

    Clients choose the format (OpenMetrics or Prometheus's text) by their Accept header. Raises ConfigError for an
    address that is none, is not this host's, or is in use.
    """
    from prometheus_client import make_wsgi_app

    server = _bind(*parse_address(address), address)
    server.set_app(make_wsgi_app(registry))
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="asyncvmm-metrics", daemon=True)
    thread.start()
    try:
        host, port = server.server_address[:2]
        yield f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/metrics"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _bind(host: str, port: int, address: str) -> _Server:
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        kind = type("_FamilyServer", (_Server,), {"address_family": family})
        server: _Server = kind(place[:2], _Handler)
    except (OSError, UnicodeError) as error:
        number = getattr(error, "errno", None)
        why = "which is in use" if number == errno.EADDRINUSE else getattr(error, "strerror", None) or str(error)
        raise ConfigError("--listen", expected="an address to listen on", found=f"{address}, {why}") from None
    return server


class _Handler(WSGIRequestHandler):
    timeout = PATIENCE_S

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are nobody's news."""

    def handle(self) -> None:
        # Clients that vanish or dawdle are no news, either.
        with suppress(OSError):
            super().handle()


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def __init__(self, *args: Any) -> None:
        self._free = threading.BoundedSemaphore(MAX_CLIENTS)
        super().__init__(*args)

    def server_bind(self) -> None:
        # As WSGIServer, but without the look-up of our own name, which can take seconds.
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._free.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """What a client does wrong is not written on our stderr."""
