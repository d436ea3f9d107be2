"""A hub that cannot be reached is noticed at once, and its cache is used."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import constants

from firstlight.tasks.nn.weights import hub_access
from firstlight.tasks.nn.weights.hub_access import find_cached_file, find_unknown_host


def forget_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)


def test_a_host_without_an_address_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_access, "getproxies", dict)
    assert find_unknown_host("http://localhost:80/x") is None
    forget_names(monkeypatch)
    assert find_unknown_host("https://hub.example/models") == "hub.example"


def test_a_proxy_knows_other_names(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_names(monkeypatch)
    monkeypatch.setattr(hub_access, "getproxies", lambda: {"https": "http://proxy:3128"})
    assert find_unknown_host("https://hub.example/models") is None


def test_files_of_the_cache_are_found_in_the_order_of_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_cached_file("me/net", ("a.bin", "b.bin"), None) is None
    repository = tmp_path / "models--me--net"
    snapshot = repository / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("c0ffee")
    (snapshot / "b.bin").write_bytes(b"b")
    assert find_cached_file("me/net", ("a.bin", "b.bin"), None) == snapshot / "b.bin"
    (snapshot / "a.bin").write_bytes(b"a")
    assert find_cached_file("me/net", ("a.bin", "b.bin"), "main") == snapshot / "a.bin"
    assert find_cached_file("me/net", ("a.bin",), "v2") is None
