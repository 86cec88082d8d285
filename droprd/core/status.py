"""What `status` and `why` say: the workers' gauges put together. Values in, values out.

The angel calls this with the gauges its workers told it; `droprctl` without a daemon calls it
with those it found in state/. Nothing here walks a spool. Gauges come from another process or
from a file: what has not the form it should have is left out, never an error.

A status document (schema 1) is a map of

    schema node version state uptime_s as_of
    workers.NAME   state pid restarts (and failures, next_start_s, stuck where they say something)
    peers.NAME     state queued bytes oldest_age_s last_error next_try_s (and since_s attempt …)
    channels.NAME  ready leased dead
    dead_letters unmerged_bytes spool.{bytes,free_bytes} receiver paused draining listen problems
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any, Final

from droprd.errors import UnknownPeer

SCHEMA: Final = 1
WORKERS: Final = ("sender", "receiver", "janitor")

Map = Mapping[str, Any]

_PEER_DEFAULTS: Final[Map] = {
    "state": "unknown",
    "queued": 0,
    "bytes": 0,
    "oldest_age_s": None,
    "last_error": None,
    "next_try_s": None,
    "since_s": None,
    "attempt": 0,
    "delivered": 0,
}
_CHANNEL_DEFAULTS: Final[Map] = {"ready": 0, "leased": 0, "dead": 0}


def rfc3339(wall_ns: int) -> str:
    """Wall time as RFC 3339 in UTC, to the millisecond."""
    when = datetime.datetime.fromtimestamp(wall_ns // 1_000_000 / 1000, datetime.UTC)
    return when.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def duration(seconds: float) -> str:
    """A duration for people: `45 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    whole = max(0, round(seconds))
    if whole < 100:
        return f"{whole} s"
    minutes = whole // 60
    if minutes < 100:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes} min" if minutes else f"{hours} h"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h" if hours else f"{days} d"


def status_document(
    *,
    node: str,
    version: str,
    state: str,
    uptime_s: float,
    as_of_ns: int,
    workers: Mapping[str, Map],
    gauges: Mapping[str, Map],
    peers: Iterable[str],
    channels: Iterable[str] = (),
    paused: Mapping[str, Map] | None = None,
    draining: Iterable[str] = (),
    listen: Iterable[str] = (),
    spool: Map | None = None,
    problems: Iterable[str] = (),
) -> dict[str, Any]:
    """The status document.

    Args:
        node: this node's name. version: of droprd.
        state: starting, running, stopping or stopped.
        uptime_s: seconds since the daemon started, 0 when stopped.
        as_of_ns: wall time at which the gauges were true.
        workers: per worker what the angel knows of its process.
        gauges: per worker what it told last.
        peers, channels: the configured ones; they are shown even if no gauge names them.
        paused, draining: as in state/public.
        listen: the addresses the receiver listens on.
        spool: {bytes, free_bytes} where the janitor has not told them.
        problems: sentences of the angel's own; those of the workers are added.
    """
    sender, receiver, janitor = (_map(gauges.get(name)) for name in WORKERS)
    paused = paused or {}
    draining = sorted(draining)
    room = {**_map(spool), **_map(janitor.get("spool"))}
    return {
        "schema": SCHEMA,
        "node": node,
        "version": version,
        "state": state,
        "uptime_s": round(uptime_s, 3),
        "as_of": rfc3339(as_of_ns),
        "workers": {name: dict(one) for name, one in workers.items()},
        "peers": _peers(_map(sender.get("peers")), peers, paused, draining),
        "channels": {
            name: {**_CHANNEL_DEFAULTS, **_map(_map(janitor.get("channels")).get(name))}
            for name in sorted({*_map(janitor.get("channels")), *channels})
        },
        "dead_letters": _count(sender.get("dead")) + _count(janitor.get("dead_letters")),
        "unmerged_bytes": _count(sender.get("unmerged_bytes")),
        "spool": {
            "bytes": _count(room.get("bytes")),
            "free_bytes": _count(room.get("free_bytes")),
        },
        "receiver": {
            "lanes": _count(receiver.get("lanes")),
            "received": _count(receiver.get("received")),
            "refused": _map(receiver.get("refused")),
            "full": bool(receiver.get("full")),
        },
        "outbox_full": bool(sender.get("full")),
        "paused": {target: dict(one) for target, one in paused.items()},
        "draining": draining,
        "listen": list(listen),
        "problems": [
            *problems,
            *(
                text
                for told in (sender, receiver, janitor)
                for text in _list(told.get("problems"))
                if isinstance(text, str)
            ),
        ],
        "corrupt": sum(_count(told.get("corrupt")) for told in (sender, receiver, janitor)),
        "lost": _count(receiver.get("lost")),
        "last_merge_age_s": sender.get("last_merge_age_s"),
    }


def _peers(
    told: Map, configured: Iterable[str], paused: Map, draining: list[str]
) -> dict[str, dict[str, Any]]:
    known = set(configured)
    result = {}
    for name in sorted({*told, *known}):
        peer = {**_PEER_DEFAULTS, **_map(told.get(name))}
        if name not in known:
            peer["state"] = "unconfigured"
        elif "" in paused or name in paused:
            peer["state"] = "paused"
        elif "" in draining or name in draining:
            peer["state"] = "draining" if peer["state"] in ("open", "unknown") else peer["state"]
        result[name] = peer
    return result


def _map(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


# -- why -----------------------------------------------------------------------------------------


def why_peer(status: Map, peer: str) -> dict[str, Any]:
    """Why messages to `peer` wait, or that they do not.

    Returns {schema, peer, state, cause, since_s, attempt, next_try_s, queued, bytes, oldest_age_s,
    last_error, command, text}: `command` is what to type to change it ("" if nothing is wrong),
    `text` the whole as sentences. Raises: UnknownPeer.
    """
    known = _map(status.get("peers"))
    if peer not in known:
        raise UnknownPeer(
            f"no peer {peer!r} is configured and nothing waits for it",
            why=f"configured are {', '.join(known)}" if known else "no peer is configured",
            hint="see `droprctl peer list`, or `droprctl peer add NAME URL`",
        )
    about = known[peer]
    cause, command = _cause(status, peer, about)
    since_s = about["since_s"]
    if about["state"] == "paused":
        pause = _pause_of(status, peer)
        since_s = _age_s(status, pause.get("since_wall_ns"))
    result = {
        "schema": SCHEMA,
        "peer": peer,
        "state": about["state"],
        "cause": cause,
        "since_s": since_s,
        "attempt": about["attempt"],
        "next_try_s": about["next_try_s"],
        "queued": about["queued"],
        "bytes": about["bytes"],
        "oldest_age_s": about["oldest_age_s"],
        "last_error": about["last_error"],
        "command": command,
    }
    result["text"] = " ".join(_sentences(result))
    return result


def _cause(status: Map, peer: str, about: Map) -> tuple[str, str]:
    """(cause, command to type) of a peer's state. What holds up everything comes first."""
    if status.get("state") == "stopped":
        return "the daemon of this node is stopped", "systemctl start droprd"
    sender = _map(_map(status.get("workers")).get("sender"))
    if sender.get("stuck"):
        return "the sender is stuck in the kernel, most likely by its disk", "droprctl status"
    if sender and sender.get("state") != "running":
        return f"the sender of this node is {sender.get('state')}", "droprctl status"
    state = about["state"]
    if state == "paused":
        named = peer if peer in _map(status.get("paused")) else ""
        return _pause_text(_pause_of(status, peer), named), f"droprctl resume {named}".rstrip()
    if state == "unconfigured":
        return (
            "no peer of this name is configured any more; its messages wait",
            f"droprctl peer add {peer} URL",
        )
    held = about.get("held")
    if held:
        return str(held), f"droprctl peer reset {peer} --replay (or --continue)"
    if state == "draining":
        return "it is being drained: new messages are refused, queued ones go out", (
            f"droprctl resume {peer}" if peer in status.get("draining", ()) else "droprctl resume"
        )
    if state in ("throttled", "probing"):
        return (
            f"it does not take messages: {about['last_error'] or 'the last try failed'}",
            f"droprctl retry {peer}",
        )
    if state == "unknown":
        return "the sender has not said anything of it yet", "droprctl status"
    below = [t for t in _map(status.get("paused")) if t.startswith(f"{peer}/")]
    if below:
        return f"paused below it: {', '.join(sorted(below))}", f"droprctl resume {sorted(below)[0]}"
    if about["queued"]:
        return "nothing holds it up: messages are on their way", ""
    return "nothing waits", ""


def _pause_of(status: Map, peer: str) -> dict[str, Any]:
    """The pause that holds `peer`: its own, or that of the whole node."""
    paused = _map(status.get("paused"))
    return _map(paused.get(peer) or paused.get(""))


def _age_s(status: Map, wall_ns: Any) -> float | None:
    """How long before the status `wall_ns` was, in seconds."""
    if not isinstance(wall_ns, int):
        return None
    as_of = datetime.datetime.fromisoformat(status["as_of"].replace("Z", "+00:00"))
    return max(0.0, round(as_of.timestamp() - wall_ns / 1e9, 1))


def _pause_text(pause: Map, target: str) -> str:
    text = f"{'it' if target else 'the whole node'} was paused by {pause.get('who') or 'somebody'}"
    if pause.get("reason"):
        text += f" ({pause['reason']})"
    if pause.get("until_wall_ns"):
        text += f" until {rfc3339(pause['until_wall_ns'])}"
    return text


def _sentences(about: Map) -> list[str]:
    cause = about["cause"]
    sentences = [f"{about['peer']} is {about['state']}: {cause}."]
    if about["since_s"] is not None and about["state"] != "open":
        tries = f", attempt {about['attempt']}" if about["attempt"] else ""
        sentences.append(f"So for {duration(about['since_s'])}{tries}.")
    if about["queued"]:
        waits = f"{about['queued']} messages ({about['bytes']} bytes) wait"
        if about["oldest_age_s"] is not None:
            waits += f", the oldest for {duration(about['oldest_age_s'])}"
        sentences.append(f"{waits}.")
    if about["next_try_s"] is not None:
        sentences.append(f"The next try is in {duration(about['next_try_s'])}.")
    if about["command"]:
        sentences.append(f"Type: {about['command']}")
    return sentences
