"""Connections: how many, how slow, on which sockets, and how they end."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from pathlib import Path

import pytest
import trustme

from droprd.errors import ConfigError
from droprd.net.credentials import Tokens
from droprd.net.intake import Limits
from droprd.net.listen import Listener
from droprd.net.push import CurlTransport
from droprd.net.service import Answer
from droprd.net.transport import Request, TransportError, TransportOptions
from droprd.testing.serving import Client, Recorder, run, serving, until


def test_connections_of_one_address_are_counted_and_capped() -> None:
    async def test() -> None:
        async with serving(Limits(connections_per_address=3)) as here:
            clients = [await here.connect() for _ in range(3)]
            await until(lambda: here.listener.connections == 3)
            extra = await here.connect()
            assert await extra.ended()
            assert here.listener.refused == {"connections_per_address": 1}
            clients[0].writer.close()
            await until(lambda: here.listener.connections == 2)
            assert (await here.ask()).status == 200

    run(test)


def test_connections_in_all_are_capped() -> None:
    async def test() -> None:
        async with serving(Limits(connections_max=2)) as here:
            kept = [await here.connect() for _ in range(2)]
            await until(lambda: here.listener.connections == 2)
            assert await (await here.connect()).ended()
            assert here.listener.refused == {"connections_max": 1}
            assert len(kept) == 2

    run(test)


def test_a_head_that_does_not_come_closes_the_connection() -> None:
    async def test() -> None:
        async with serving(Limits(header_timeout_s=0.1)) as here:
            silent = await here.connect()
            slow = await here.connect()
            slow.writer.write(b"POST /v1/push HTTP/1.1\r\nA: ")
            assert await silent.ended()
            assert await slow.ended()
            await until(lambda: here.listener.connections == 0)

    run(test)


def test_a_connection_serves_many_requests() -> None:
    async def test() -> None:
        async with serving() as here:
            client = await here.connect()
            for n in range(5):
                client.send(body=b"%d" % n)
                assert (await client.reply()).status == 200
            assert [call[2] for call in here.service.calls] == [b"0", b"1", b"2", b"3", b"4"]
            assert here.listener.connections == 1

    run(test)


def test_stopping_lets_a_request_end_and_closes_idle_connections() -> None:
    async def test() -> None:
        go = asyncio.Event()

        async def wait() -> Answer:
            await go.wait()
            return Answer(body=b"late")

        async with serving(service=Recorder(then=wait)) as here:
            idle = await here.connect()
            busy = await here.connect()
            uploading = await here.connect()
            busy.send()
            uploading.send(body=b"x", raw=["Content-Length: 3"])
            await until(lambda: here.listener.intake.in_flight == 2)
            stopping = asyncio.create_task(here.listener.stop(10))
            assert await idle.ended()
            uploading.writer.write(b"yz")
            await until(lambda: len(here.service.calls) == 2)
            go.set()
            for client in (busy, uploading):
                reply = await client.reply()
                assert (reply.status, reply.body) == (200, b"late")
                assert await client.ended()
            assert await stopping
            assert here.listener.connections == 0

    run(test)


def test_stopping_has_a_bound() -> None:
    async def test() -> None:
        async def never() -> Answer:
            await asyncio.Event().wait()
            return Answer()

        async with serving(service=Recorder(then=never)) as here:
            client = await here.connect()
            client.send()
            await until(lambda: here.listener.intake.in_flight == 1)
            loop = asyncio.get_running_loop()
            began = loop.time()
            assert not await here.listener.stop(0.2)
            assert loop.time() - began < 3
            assert await client.ended()

    run(test)


def test_the_sockets_go_on_with_the_next_listener_and_no_connection_is_refused() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            port = listening.getsockname()[1]
            tokens = Tokens({"hamburg": "secret"})
            first = Listener(Recorder(), tokens)
            await first.start([listening])
            assert await first.stop(1)
            client = Client(*await asyncio.open_connection("127.0.0.1", port))
            client.send()
            second = Listener(Recorder(), tokens)
            await second.start([listening])
            assert (await client.reply()).status == 200
            await second.stop(1)

    run(test)


def test_without_tls_only_loopback_is_listened_on_unless_allowed() -> None:
    async def test() -> None:
        tokens = Tokens()
        for host, family in (("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)):
            with socket.create_server((host, 0), family=family) as listening:
                with pytest.raises(ConfigError, match="without TLS"):
                    await Listener(Recorder(), tokens).start([listening])
                allowed = Listener(Recorder(), tokens, allow_plain_http=True)
                await allowed.start([listening])
                await allowed.stop(1)

    run(test)


def test_on_a_unix_socket_the_own_user_needs_no_token(tmp_path: Path) -> None:
    async def test() -> None:
        url = f"unix:{tmp_path}/receive.sock"
        request = Request("POST", url, "/v1/push", [b"x"], None, {"Droprd-Version": "1"})
        for own_name, status in (("berlin", 200), (None, 401)):
            with socket.socket(socket.AF_UNIX) as listening:
                listening.bind(url.removeprefix("unix:"))
                listening.listen()
                service = Recorder()
                listener = Listener(service, Tokens({"hamburg": "secret"}), own_name=own_name)
                await listener.start([listening])
                transport = CurlTransport()
                assert (await transport.exchange(request)).status == status
                assert service.calls == ([("push", "berlin", b"x")] if own_name else [])
                await transport.aclose()
                await listener.stop(1)
            os.unlink(url.removeprefix("unix:"))

    run(test)


VERSION = {"Droprd-Version": "1"}


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def tls(authority: trustme.CA, *, ask_certificate: bool = False) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)
    if ask_certificate:
        context.verify_mode = ssl.CERT_REQUIRED
        authority.configure_trust(context)
    return context


async def exchange_over(
    context: ssl.SSLContext,
    options: TransportOptions,
    host: str = "localhost",
    token: str | None = "secret",
) -> int:
    async with serving(ssl_context=context) as here:
        transport = CurlTransport(options)
        try:
            url = f"https://{host}:{here.port}"
            request = Request("POST", url, "/v1/push", [b"x"], token, VERSION)
            return (await transport.exchange(request)).status
        finally:
            await transport.aclose()


def test_https_is_checked_by_default(authority: trustme.CA, tmp_path: Path) -> None:
    async def test() -> None:
        ca_file = str(tmp_path / "ca.pem")
        authority.cert_pem.write_to_path(ca_file)
        assert await exchange_over(tls(authority), TransportOptions(ca_file=ca_file)) == 200
        for options, host in (
            (TransportOptions(), "localhost"),
            (TransportOptions(ca_file=ca_file), "127.0.0.1"),
            (TransportOptions(ca_file=str(tmp_path / "missing.pem")), "localhost"),
        ):
            with pytest.raises(TransportError) as caught:
                await exchange_over(tls(authority), options, host)
            assert caught.value.kind == "tls"

    run(test)


def test_a_missing_client_certificate_is_said_in_plain_words(
    authority: trustme.CA, tmp_path: Path
) -> None:
    async def test() -> None:
        ca_file, own = str(tmp_path / "ca.pem"), str(tmp_path / "own.pem")
        authority.cert_pem.write_to_path(ca_file)
        authority.issue_cert("hamburg.example").private_key_and_cert_chain_pem.write_to_path(own)
        context = tls(authority, ask_certificate=True)
        for token, kind in ((None, "auth"), ("secret", "reset")):
            with pytest.raises(TransportError, match="requires a client certificate") as caught:
                await exchange_over(context, TransportOptions(ca_file=ca_file), token=token)
            assert caught.value.kind == kind
        assert await exchange_over(context, TransportOptions(ca_file=ca_file, cert_file=own)) == 200

    run(test)


def test_a_handshake_that_does_not_come_is_ended_and_counted(authority: trustme.CA) -> None:
    async def test() -> None:
        async with serving(Limits(header_timeout_s=0.2), ssl_context=tls(authority)) as here:
            client = await here.connect()
            assert await client.ended()
            await until(lambda: here.listener.refused.get("handshake") == 1)
            plain = await here.connect()
            plain.send()
            assert await plain.ended()
            await until(lambda: here.listener.connections == 0)

    run(test)


def test_nobody_there_and_no_such_name_are_told_apart() -> None:
    async def test() -> None:
        with socket.create_server(("127.0.0.1", 0)) as unused:
            port = unused.getsockname()[1]
        transport = CurlTransport()
        for url, kind in (
            (f"http://127.0.0.1:{port}", "connect"),
            ("http://no-such-host.invalid:1", "resolve"),
            ("unix:/nowhere/at/all.sock", "connect"),
        ):
            with pytest.raises(TransportError) as caught:
                await transport.exchange(Request("POST", url, "/v1/push", [b"x"]))
            assert caught.value.kind == kind, caught.value
            assert url in str(caught.value)
        await transport.aclose()

    run(test)


def test_tokens_are_replaced_as_a_whole_or_not_at_all() -> None:
    tokens = Tokens({"hamburg": "one", "berlin": "two"})
    assert tokens.peer_of("Bearer one") == "hamburg"
    assert tokens.peer_of("bearer two") == "berlin"
    for header in (
        None,
        "",
        "one",
        "Bearer",
        "Bearer ",
        "Bearer one ",
        "Bearer one,two",
        "Basic one",
    ):
        assert tokens.peer_of(header) is None
    with pytest.raises(ConfigError, match="same token"):
        tokens.replace({"a": "x", "b": "x"})
    with pytest.raises(ConfigError, match="cannot be used"):
        tokens.replace({"a": "line\nbreak"})
    assert tokens.peer_of("Bearer one") == "hamburg"
    tokens.replace({"hamburg": "three"})
    assert tokens.peer_of("Bearer one") is None
    assert tokens.peer_of("Bearer three") == "hamburg"
