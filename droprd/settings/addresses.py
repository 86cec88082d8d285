"""Where a node and its monitor may listen and where a peer may be reached.

The rules for the configuration and for `droprctl`: plain HTTP leaves this machine only where it is
asked for. Raises ValueError whose text says what is wrong and what to write instead.
"""

from __future__ import annotations

import ipaddress
import re
from importlib.metadata import entry_points
from urllib.parse import urlsplit

SCHEMES = ("https", "http", "unix")
SOCKET_PATH_BYTES_MAX = 107  # sun_path of unix(7), its ending zero left out
_PORT = re.compile(r"[0-9]{1,5}\Z")


def is_loopback(host: str) -> bool:
    """Whether a host name or address certainly means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def split_address(text: str) -> tuple[str, int]:
    """(host, port) of "HOST:PORT" or "[IPV6]:PORT". Raises ValueError."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        ipaddress.IPv6Address(host)
    elif ":" in host:
        raise ValueError(f"{text!r} needs brackets around the address, like [::1]:7707")
    if not colon or not host or not _PORT.match(port) or int(port) > 65535:
        raise ValueError(f"{text!r} is no HOST:PORT, nor unix:/PATH")
    return host, int(port)


def check_url(url: str, *, allow_plain_http: bool) -> str:
    """Return `url` if a peer may be reached there. Raises ValueError."""
    scheme, colon, rest = url.partition(":")
    if not colon or not rest:
        raise ValueError(f"{url!r} is no URL, like https://berlin.example:7707")
    if scheme not in SCHEMES:
        others = tuple(point.name for point in entry_points(group="droprd.transports"))
        if scheme in others:
            return url
        raise ValueError(
            f"no transport for {scheme!r} is installed; there are {', '.join(SCHEMES + others)}"
        )
    parts = urlsplit(url)
    if scheme == "unix":
        if not parts.path.startswith("/") or parts.netloc:
            raise ValueError(f"{url!r} names no socket, like unix:///run/berlin/receiver.sock")
        return url
    if not parts.hostname:
        raise ValueError(f"{url!r} names no host")
    if parts.port == 0:
        raise ValueError(f"{url!r}: port 0 cannot be reached")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{url!r}: user, query and fragment have no place here; use token_file")
    if scheme == "http" and not allow_plain_http and not is_loopback(parts.hostname):
        raise ValueError(
            f"plain http to {parts.hostname} would show the token and all messages on the way; "
            "use https, or set allow_plain_http = true for this peer (peer add --allow-plain-http)"
        )
    return url


def check_listen(text: str, *, allow_plain_http: bool) -> str:
    """Return `text` if the receiver may listen there. Raises ValueError."""
    if text.startswith("unix:"):
        if not text.removeprefix("unix:").strip("/"):
            raise ValueError(f"{text!r} names no socket")
        return text
    host, _ = split_address(text)
    if not allow_plain_http and not is_loopback(host):
        raise ValueError(
            f"plain http on {host} would show tokens and messages to the network; listen "
            "on loopback behind a TLS proxy, or set receiver.allow_plain_http = true "
            "(init --allow-plain-http)"
        )
    return text


def check_monitor(text: str) -> str:
    """Return `text` if health may be served there, "" being nowhere. Raises ValueError."""
    if not text:
        return text
    if text.startswith("unix:"):
        return check_listen(text, allow_plain_http=False)
    host, _ = split_address(text)
    if not is_loopback(host):
        raise ValueError(
            f"health on {host} would tell the network everything about this node; listen on "
            "loopback, or on unix:/PATH, with a proxy in front where others must reach it"
        )
    return text
