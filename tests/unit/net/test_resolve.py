"""Names: looked up once, kept a while, never holding anybody up."""

from __future__ import annotations

import asyncio
import socket
import threading

import pytest

from droprd.net.resolve import Resolver
from droprd.net.transport import TransportError
from droprd.testing.serving import run


def test_addresses_are_handed_on_in_their_order() -> None:
    async def test() -> None:
        resolver = Resolver(lambda host, port: ["2001:db8::1", "192.0.2.1"])
        for url, entry in (
            ("https://berlin.example:7707", "+berlin.example:7707:[2001:db8::1],192.0.2.1"),
            ("https://berlin.example", "+berlin.example:443:[2001:db8::1],192.0.2.1"),
            ("http://127.0.0.1:7707", None),
            ("http://[::1]:7707", None),
        ):
            assert await resolver.entry(url, 5) == entry

    run(test)


def test_a_name_is_looked_up_once_for_many_and_again_when_forgotten() -> None:
    asked: list[str] = []

    def lookup(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["192.0.2.1"]

    async def test() -> None:
        resolver = Resolver(lookup)
        await asyncio.gather(*(resolver.entry("http://a.example:1", 5) for _ in range(5)))
        await resolver.entry("http://a.example:1", 5)
        assert asked == ["a.example"]
        resolver.forget()
        await resolver.entry("http://a.example:1", 5)
        assert asked == ["a.example"] * 2

    run(test)


def test_a_name_server_that_does_not_answer_holds_nobody_up() -> None:
    release = threading.Event()

    def lookup(host: str, port: int) -> list[str]:
        if host == "silent.example":
            release.wait(30)
        return ["192.0.2.1"]

    async def test() -> None:
        resolver = Resolver(lookup)
        for _ in range(2):
            with pytest.raises(TransportError, match=r"did not answer within 0\.05 s") as caught:
                await resolver.entry("http://silent.example:1", 0.05)
            assert caught.value.kind == "resolve"
        assert await resolver.entry("http://other.example:1", 5)
        waiting = asyncio.create_task(resolver.entry("http://silent.example:1", 30))
        await asyncio.sleep(0)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        assert waiting.cancelled()
        release.set()
        assert await resolver.entry("http://silent.example:1", 5)

    run(test)


def test_a_name_that_does_not_exist_is_told_and_asked_for_again() -> None:
    known = False

    def lookup(host: str, port: int) -> list[str]:
        if not known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return ["192.0.2.1"]

    async def test() -> None:
        nonlocal known
        resolver = Resolver(lookup)
        with pytest.raises(TransportError, match=r"a\.example: Name or service not known"):
            await resolver.entry("http://a.example:1", 5)
        known = True
        assert await resolver.entry("http://a.example:1", 5)

    run(test)


@pytest.mark.parametrize("url", ["http://x:port", "gopher://x", "http://x:99999"])
def test_a_url_that_cannot_be_read_is_a_local_error(url: str) -> None:
    async def test() -> None:
        with pytest.raises(TransportError) as caught:
            await Resolver().entry(url, 5)
        assert caught.value.kind == "local"

    run(test)
