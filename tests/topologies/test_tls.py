"""An index over TLS, with a certificate authority of our own: works, or says why not, without a password.

On one server, on a cluster, and where sentinels say who is the master.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from celery_goalstate.exceptions import IndexUnavailable
from tests.servers import HOST, Cluster, RedisServer, free_port, require
from tests.topologies.conftest import EngineOn
from tests.topologies.sentinels import Sentinels

PASSWORD = "s3cr3t"


def openssl(directory: Path, *arguments: str) -> None:
    command = [require("openssl"), *arguments]
    subprocess.run(command, cwd=directory, check=True, capture_output=True)


class Authority:
    """Signs certificates."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._name = name
        self.certificate = directory / f"{name}.pem"
        openssl(
            directory,
            *("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.pem"),
        )

    def sign(self, name: str, address: str) -> tuple[str, str]:
        """A certificate and its key for whoever is at this address."""
        extension = self._directory / f"{name}.ext"
        extension.write_text(f"subjectAltName=IP:{address}\n")
        openssl(
            self._directory,
            *("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}"),
            *("-keyout", f"{name}.key", "-out", f"{name}.csr"),
        )
        openssl(
            self._directory,
            *("x509", "-req", "-in", f"{name}.csr", "-days", "2", "-out", f"{name}.pem"),
            *("-CA", f"{self._name}.pem", "-CAkey", f"{self._name}.key", "-CAcreateserial"),
            *("-extfile", extension.name),
        )
        return str(self._directory / f"{name}.pem"), str(self._directory / f"{name}.key")

    def of_server(self, name: str, address: str) -> dict[str, str]:
        """Options of a server that has such a certificate, and asks nobody else for one."""
        certificate, key = self.sign(name, address)
        return {
            "tls-cert-file": certificate,
            "tls-key-file": key,
            "tls-ca-cert-file": str(self.certificate),
            "tls-auth-clients": "no",
        }


@dataclass
class Place:
    """A server that takes TLS on one port, and anything on another."""

    server: RedisServer
    tls_port: int
    ours: Path  #: the authority that signed its certificate
    others: Path

    def url(self, authority: Path, *, scheme: str = "rediss", port: int = 0, more: str = "") -> str:
        where = f"{HOST}:{port or self.tls_port}"
        return f"{scheme}://default:{PASSWORD}@{where}/0?ssl_ca_certs={authority}{more}"


def place(directory: Path, address: str) -> Place:
    ours, others = (Authority(directory, name) for name in ("ours", "others"))
    port = free_port()
    options = {"tls-port": str(port), **ours.of_server("server", address)}
    server = RedisServer(
        directory / "server", *(word for name, value in options.items() for word in (f"--{name}", value))
    )
    return Place(server, port, ours.certificate, others.certificate)


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    here = place(tmp_path_factory.mktemp("here"), HOST)
    with here.server as server:
        with server.client() as client:
            client.config_set("requirepass", PASSWORD)
        yield here


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """Its certificate is for another address."""
    elsewhere = place(tmp_path_factory.mktemp("elsewhere"), "10.1.2.3")
    with elsewhere.server:
        yield elsewhere


def refusal(engine_on: EngineOn, url: str, **conf: Any) -> str:
    """What an enqueue says, which never shows the password."""
    engine, host = engine_on(url, **conf)
    with pytest.raises(IndexUnavailable) as caught:
        engine.enqueue(host("1"))
    error: BaseException | None = caught.value
    while error:
        assert PASSWORD not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__
    assert PASSWORD not in repr(engine.settings)
    return str(caught.value)


def test_a_certificate_of_the_authority_that_is_named(here: Place, engine_on: EngineOn) -> None:
    engine, host = engine_on(here.url(here.ours))
    assert engine.enqueue(host("1"), 60).changed
    assert engine.is_scheduled(host("1"))
    assert engine.delete(host("1"))


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
def test_a_certificate_of_another_authority_is_refused(here: Place, engine_on: EngineOn, scheme: str) -> None:
    said = refusal(engine_on, here.url(here.others, scheme=scheme))
    assert said.startswith("the index's certificate is refused (?ssl_ca_certs= names the authority to trust)")
    assert "self-signed certificate in certificate chain" in said


def test_a_certificate_for_another_address_is_refused(elsewhere: Place, engine_on: EngineOn) -> None:
    said = refusal(engine_on, elsewhere.url(elsewhere.ours))
    assert f"certificate is not valid for '{HOST}'" in said


def test_tls_where_there_is_none_and_none_where_there_is(here: Place, engine_on: EngineOn) -> None:
    quick = {"goalstate_index_timeout": 0.5}
    refusal(engine_on, here.url(here.ours, port=here.server.port), **quick)
    refusal(engine_on, f"redis://default:{PASSWORD}@{HOST}:{here.tls_port}/0", **quick)


def test_who_wants_no_check_says_so(here: Place, engine_on: EngineOn) -> None:
    engine, host = engine_on(here.url(here.others, more="&ssl_cert_reqs=none&ssl_check_hostname=false"))
    assert engine.enqueue(host("1"), 60).changed


def test_a_cluster(tmp_path: Path, engine_on: EngineOn) -> None:
    """Its nodes name each other by the ports that take TLS."""
    ours, others = (Authority(tmp_path, name) for name in ("ours", "others"))
    options = {name.replace("-", "_"): value for name, value in ours.of_server("node", HOST).items()}
    tls = {"tls_port": free_port, "tls_cluster": "yes", **options}
    with Cluster(tmp_path / "nodes", RedisServer, **tls) as cluster:
        ports = []
        for node in cluster.nodes:
            with node.client() as client:
                ports.append(client.config_get("tls-port")["tls-port"])
                client.config_set("requirepass", PASSWORD)

        def url(authority: Authority) -> str:
            nodes = ";".join(f"rediss+cluster://default:{PASSWORD}@{HOST}:{port}" for port in ports)
            return f"{nodes}?ssl_ca_certs={authority.certificate}"

        engine, host = engine_on(url(ours))
        engine.app.conf.goalstate_shards = 16
        ids = [str(number) for number in range(64)]
        assert engine.enqueue_many(map(host, ids), 60) == len(ids), "on all nodes"
        assert all(engine.describe_many(map(host, ids)))
        assert refusal(engine_on, url(others)).startswith("the index's certificate is refused")


def test_sentinels_and_their_master(tmp_path: Path, engine_on: EngineOn) -> None:
    """TLS with both; and with the next master, too."""
    ours, others = (Authority(tmp_path, name) for name in ("ours", "others"))
    with Sentinels(tmp_path, tls=ours.of_server("server", HOST)) as sentinels:
        engine, host = engine_on(sentinels.url)
        assert engine.enqueue(host("1"), 60).changed
        for url in (
            sentinels.url.replace(str(ours.certificate), str(others.certificate)),
            sentinels.url.partition("&")[0].replace("rediss+", ""),
        ):
            assert "No master found for 'shop'" in refusal(engine_on, url)
        sentinels.master.kill()
        sentinels.promoted()
        assert engine.enqueue(host("2"), 60).changed
