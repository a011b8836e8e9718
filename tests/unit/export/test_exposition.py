"""Metrics in a file and over HTTP."""

from __future__ import annotations

import os
import socket
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from urllib.error import HTTPError

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families as prometheus_text

from asyncvmm.errors import ConfigError
from asyncvmm.export import exposition
from asyncvmm.export.exposition import check_target, parse_address, serving, write_metrics
from tests.support.openmetrics import families_of

OPEN_METRICS = "application/openmetrics-text; version=1.0.0"


@pytest.fixture
def registry() -> CollectorRegistry:
    """One counter that stands at 1."""
    registry = CollectorRegistry()
    Counter("things", "Things.", registry=registry).inc()
    return registry


# -- a file ------------------------------------------------------------------------------------------------------------


def test_a_file_is_replaced_whole(registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "metrics"
    path.write_bytes(b"old")
    with path.open("rb") as reader:
        write_metrics(registry, str(path))
        assert reader.read() == b"old"
    assert list(families_of(path.read_text())) == ["things"]
    assert path.read_bytes().endswith(b"# EOF\n")
    assert os.listdir(tmp_path) == ["metrics"]


def test_a_file_for_node_exporter_is_in_prometheus_text(registry: CollectorRegistry, tmp_path: Path) -> None:
    path = tmp_path / "asyncvmm.prom"
    write_metrics(registry, str(path))
    assert "# EOF" not in path.read_text()
    assert {sample.name for family in prometheus_text(path.read_text()) for sample in family.samples} >= {
        "things_total"
    }
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_link_stays_a_link(registry: CollectorRegistry, tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"")
    (tmp_path / "link").symlink_to("real")
    write_metrics(registry, str(tmp_path / "link"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes().endswith(b"# EOF\n")


@pytest.mark.parametrize("target", ["/dev/null", "/dev", "/nonexistent/directory/file", "/dev/null/x", "a\0b", ""])
def test_what_is_no_file_is_refused_and_left_alone(registry: CollectorRegistry, target: str) -> None:
    with pytest.raises(ConfigError, match="--prometheus"):
        check_target(target)
    with pytest.raises(ConfigError, match="--prometheus"):
        write_metrics(registry, target)
    assert Path("/dev/null").is_char_device()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    registry: CollectorRegistry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics"
    path.write_bytes(b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(ConfigError, match="No space left on device"):
        write_metrics(registry, str(path))
    assert (os.listdir(tmp_path), path.read_bytes()) == (["metrics"], b"old")


# -- an address --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "place"),
    [("127.0.0.1:9100", ("127.0.0.1", 9100)), ("[::1]:0", ("::1", 0)), ("localhost:65535", ("localhost", 65535))],
)
def test_an_address_is_host_and_port(address: str, place: tuple[str, int]) -> None:
    assert parse_address(address) == place


@pytest.mark.parametrize(
    "address",
    ["", ":", ":9100", "9100", "host", "host:", "host:-1", "host:65536", "host:٣", "::1:9100", "[]:1", "h: 1", "h:1_0"],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="HOST:PORT"):
        parse_address(address)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text: str) -> None:
    try:
        host, port = parse_address(text)
    except ConfigError:
        return
    assert host
    assert 0 <= port <= 65535


@pytest.mark.parametrize("address", ["192.0.2.1:0", "no.such.host.invalid:0", "a..b:0", f"{'x' * 300}:0", "a\0b:1"])
def test_an_address_that_is_not_ours_is_refused(registry: CollectorRegistry, address: str) -> None:
    with pytest.raises(ConfigError, match="--listen"), serving(registry, address):
        pass


def test_an_address_in_use_is_refused(registry: CollectorRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match="which is in use"), serving(registry, f"127.0.0.1:{port}"):
            pass


# -- HTTP --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def url(registry: CollectorRegistry) -> Iterator[str]:
    """Where the counter is served."""
    with serving(registry, "127.0.0.1:0") as url:
        yield url


def get(url: str, **headers: str) -> tuple[str, str]:
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as answer:
        return answer.headers["Content-Type"], answer.read().decode()


def test_a_client_is_given_the_format_it_accepts(url: str) -> None:
    kind, text = get(url, Accept=OPEN_METRICS)
    assert kind.startswith("application/openmetrics-text")
    assert list(families_of(text)) == ["things"]
    kind, text = get(url)
    assert kind.startswith("text/plain")
    assert "things_total 1.0" in text


def test_ipv6_is_served(registry: CollectorRegistry) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        with pytest.raises(ConfigError, match="--listen"), serving(registry, "[::1]:0"):
            pass
        return
    with serving(registry, "[::1]:0") as url:
        assert url.startswith("http://[::1]:")
        assert "things_total" in get(url)[1]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
def test_other_methods_are_refused(url: str, method: str) -> None:
    with pytest.raises(HTTPError, match="405"):
        urllib.request.urlopen(urllib.request.Request(url, data=b"x", method=method), timeout=10)


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"\r\n",
        b"\xff\xff\r\n\r\n",
        b"GET /\r\n\r\n",
        b"GET " + b"x" * 100_000 + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
    ],
    ids=lambda value: repr(value)[:20],
)
def test_a_client_that_talks_nonsense_harms_nobody(
    url: str, request_bytes: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    host, port = parse_address(url.removeprefix("http://").removesuffix("/metrics"))
    with socket.create_connection((host, port), timeout=10) as client, suppress(OSError):
        client.sendall(request_bytes)
        client.shutdown(socket.SHUT_WR)
    assert "things_total" in get(url)[1]
    assert capfd.readouterr() == ("", "")


def test_a_client_that_dawdles_is_left(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition._Handler, "timeout", 0.1)
    with serving(registry, "127.0.0.1:0") as url:
        host, port = parse_address(url.removeprefix("http://").removesuffix("/metrics"))
        with socket.create_connection((host, port), timeout=10) as client:
            client.sendall(b"GET /metr")
            assert client.recv(1) == b""


def test_clients_beyond_a_number_are_turned_away(registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exposition, "MAX_CLIENTS", 2)
    with serving(registry, "127.0.0.1:0") as url:
        host, port = parse_address(url.removeprefix("http://").removesuffix("/metrics"))
        silent = [socket.create_connection((host, port), timeout=10) for _ in range(2)]
        with socket.create_connection((host, port), timeout=10) as third:
            assert third.recv(1) == b""
        for client in silent:
            client.close()


def test_nothing_is_left_when_serving_ends(registry: CollectorRegistry) -> None:
    with serving(registry, "127.0.0.1:0") as url:
        get(url)
    assert not [thread for thread in threading.enumerate() if thread.name == "asyncvmm-metrics"]
    with pytest.raises(OSError, match="refused"):
        get(url)
