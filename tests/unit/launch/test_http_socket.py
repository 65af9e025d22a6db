"""What is wrong with address, certificate or keys is said before anything is started."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from launch.serving.http_socket import API_KEY, check_certificate, listen, take_api_keys, url_of
from tests.support.serving import make_certificate
from tprt.config import ServerConfig
from tprt.errors import ConfigError


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[str, str]:
    """A certificate and its key."""
    return make_certificate(tmp_path)


def test_port_0_takes_a_free_one_and_the_url_has_it() -> None:
    server = ServerConfig(port=0)
    with listen(server, has_keys=False) as listener:
        port = listener.getsockname()[1]
        assert url_of(listener, server) == f"http://127.0.0.1:{port}"
        assert url_of(listener, ServerConfig(ssl_certfile="cert.pem")) == f"https://127.0.0.1:{port}"
        with socket.create_connection(("127.0.0.1", port)):
            pass
        with pytest.raises(ConfigError, match=f"port {port}: cannot listen there: Address already"):
            listen(ServerConfig(port=port), has_keys=False)


def test_an_address_of_version_6_has_brackets_in_the_url() -> None:
    server = ServerConfig(host="::1", port=0)
    try:
        listener = listen(server, has_keys=False)
    except ConfigError:
        pytest.skip("this host has no IPv6")
    with listener:
        assert url_of(listener, server).startswith("http://[::1]:")


@pytest.mark.parametrize("host", ["no.such.host.invalid", "203.0.113.7", "a..b"])
def test_a_host_that_is_not_this_one_is_named(host: str) -> None:
    with pytest.raises(ConfigError, match=f"server.host {host}, server.port 0: cannot listen there: "):
        listen(ServerConfig(host=host, port=0), has_keys=True)


def test_an_address_that_others_can_reach_needs_a_key_or_to_be_meant_so() -> None:
    with pytest.raises(ConfigError, match=r"server\.host 0\.0\.0\.0 can be reached by others.*allow_anonymous"):
        listen(ServerConfig(host="0.0.0.0", port=0), has_keys=False)
    listen(ServerConfig(host="0.0.0.0", port=0), has_keys=True).close()
    listen(ServerConfig(host="0.0.0.0", port=0, allow_anonymous=True), has_keys=False).close()
    listen(ServerConfig(host="localhost", port=0), has_keys=False).close()


def test_keys_come_from_the_file_and_from_the_environment_where_no_child_will_see_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# who has which\n\n sk-one \nsk-two\nsk-one\n")
    monkeypatch.setenv(API_KEY, "sk-env")
    assert take_api_keys(ServerConfig(api_key_file=str(file))) == ("sk-env", "sk-one", "sk-two")
    assert API_KEY not in os.environ
    assert take_api_keys(ServerConfig()) == ()


@pytest.mark.parametrize("content", ["", "# only words\n", "sk one\n", "schlüssel\n"])
def test_a_key_file_without_a_usable_key_is_refused_without_showing_what_is_in_it(
    tmp_path: Path, content: str
) -> None:
    file = tmp_path / "keys"
    file.write_text(content)
    with pytest.raises(ConfigError, match=r"server\.api_key_file") as caught:
        take_api_keys(ServerConfig(api_key_file=str(file)))
    assert not content.strip() or content.strip() not in str(caught.value)


def test_a_key_file_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"server\.api_key_file /nowhere/keys cannot be read: No such file"):
        take_api_keys(ServerConfig(api_key_file="/nowhere/keys"))


def test_a_certificate_must_be_there_and_fit_its_key(certificate: tuple[str, str], tmp_path: Path) -> None:
    cert, key = certificate
    check_certificate(ServerConfig())
    check_certificate(ServerConfig(ssl_certfile=cert, ssl_keyfile=key))
    both = tmp_path / "both.pem"
    both.write_text(Path(cert).read_text() + Path(key).read_text())
    check_certificate(ServerConfig(ssl_certfile=str(both)))
    for certfile, keyfile in [("/nowhere.pem", key), (key, key), (cert, cert), (cert, None)]:
        with pytest.raises(ConfigError, match=r"server\.ssl_certfile .*expected PEM files"):
            check_certificate(ServerConfig(ssl_certfile=certfile, ssl_keyfile=keyfile))


def test_a_key_without_a_certificate_is_refused() -> None:
    with pytest.raises(ValueError, match="ssl_keyfile is given without ssl_certfile"):
        ServerConfig(ssl_keyfile="key.pem")
