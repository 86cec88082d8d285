"""What `status` and `why` say: the workers' gauges put together. Values in, values out.

The angel calls this with the gauges its workers told it; `droprctl` without a daemon calls it
with those it found in state/. Nothing here walks a spool. Gauges come from another process or
from a file: what has not the form it should have is left out, never an error.

A status document (schema 1) is a map of

    schema node version state uptime_s as_of
    workers.NAME   state pid restarts (and failures, next_start_s, stuck where they say something)
    peers.NAME     state configured queued bytes oldest_age_s last_error next_try_s (and since_s
                   attempt …)
    channels.NAME  ready leased dead
    dead_letters unmerged_bytes spool.{bytes,free_bytes} receiver paused draining listen problems
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping
from typing import Any, Final, NamedTuple

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
        peers, channels: the configured ones; they are shown even if no gauge names them. Others
            are shown while something waits for them.
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
        "peers": _peers(_map(sender.get("peers")), peers, node, paused, draining),
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
    told: Map, configured: Iterable[str], node: str, paused: Map, draining: list[str]
) -> dict[str, dict[str, Any]]:
    known = set(configured)
    result = {}
    for name in sorted({*told, *known}):
        peer = {**_PEER_DEFAULTS, **_map(told.get(name))}
        if name not in known and not _count(peer["queued"]):
            continue
        # A node may send to itself without being a peer of its own.
        peer["configured"] = name in known or name == node
        if not peer["configured"]:
            peer["state"] = "unconfigured"
        elif "" in paused or name in paused:
            peer["state"] = "paused"
        elif "" in draining or name in draining:
            peer["state"] = "draining" if peer["state"] in ("open", "unknown") else peer["state"]
        if peer["state"] in ("paused", "unconfigured"):
            peer["next_try_s"] = None
        result[name] = peer
    return result


def _map(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else []


def _count(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


# -- why -----------------------------------------------------------------------------------------

START: Final = "systemctl start droprd"
_SENDER_STATES: Final = {
    "backoff": "failed and waits for its next start",
    "fatal": "cannot use the configuration",
}


class _Cause(NamedTuple):
    """Why messages wait: `what` since then `details`; and, to do `aim`, the command to type."""

    what: str
    details: str = ""
    aim: str = ""
    command: str = ""
    since_s: float | None = None
    attempt: int = 0


def why_peer(status: Map, peer: str, start: str = START) -> dict[str, Any]:
    """Why messages to `peer` wait, or that they do not.

    Returns {schema, peer, state, cause, since_s, attempt, next_try_s, queued, bytes, oldest_age_s,
    last_error, command, text}: `command` is what to type to change it ("" if nothing is wrong),
    `text` the whole as one sentence, times in local time. `start` is the command that starts the
    daemon. Raises: UnknownPeer.
    """
    known = _map(status.get("peers"))
    if peer not in known:
        raise UnknownPeer(
            f"no peer {peer!r} is configured and nothing waits for it",
            why=f"configured are {', '.join(known)}" if known else "no peer is configured",
            hint="see `droprctl peer list`, or `droprctl peer add NAME URL`",
        )
    about = known[peer]
    cause = _cause(status, peer, about, start)
    since_s = about["since_s"]
    if about["state"] == "paused":
        since_s = _age_s(status, _pause_of(status, peer).get("since_wall_ns"))
    return {
        "schema": SCHEMA,
        "peer": peer,
        "state": about["state"],
        "cause": cause.what + cause.details,
        "since_s": since_s,
        "attempt": about["attempt"],
        "next_try_s": about["next_try_s"],
        "queued": about["queued"],
        "bytes": about["bytes"],
        "oldest_age_s": about["oldest_age_s"],
        "last_error": about["last_error"],
        "command": cause.command,
        "text": _sentence(status, peer, about, cause),
    }


def _cause(status: Map, peer: str, about: Map, start: str) -> _Cause:
    """What holds up everything comes first."""
    if status.get("state") == "stopped":
        return _Cause("the daemon of this node is stopped", aim="to start it", command=start)
    sender = _map(_map(status.get("workers")).get("sender"))
    if sender.get("stuck"):
        what = "the sender of this node is stuck in the kernel, most likely by its disk"
        return _Cause(what, aim="see", command="droprctl status")
    if sender and sender.get("state") != "running":
        state = str(sender.get("state"))
        command = "droprctl config check" if state == "fatal" else "droprctl status"
        what = f"the sender of this node {_SENDER_STATES.get(state, f'is {state}')}"
        return _Cause(what, aim="see", command=command)
    state = about["state"]
    if state == "paused":
        return _pause_cause(status, peer)
    if state == "unconfigured":
        if about.get("configured"):
            return _Cause(
                "it has no url, so it only sends to us",
                aim=f"set peers.{peer}.url, then",
                command="droprctl reload",
            )
        what = "no peer of this name is configured"
        return _Cause(what, aim="to add it", command=f"droprctl peer add {peer} URL")
    held = about.get("held")
    if held:
        command = f"droprctl peer reset {peer} --replay (or --continue)"
        return _Cause(f"held is {held}", aim="to go on", command=command)
    if state == "draining":
        what = "it is being drained: new messages are refused, those that wait go out"
        own = peer if peer in status.get("draining", ()) else ""
        return _Cause(what, aim="to end that", command=f"droprctl resume {own}".rstrip())
    if state in ("throttled", "probing"):
        error = about["last_error"] or "the last try failed"
        if error.startswith("401 "):
            error += f"; compare the tokens of both nodes (peers.{peer}.token_file)"
        return _Cause(
            "it has taken nothing",
            f": {error}",
            aim="to try now",
            command=f"droprctl retry {peer}",
            since_s=about["since_s"],
            attempt=_count(about["attempt"]),
        )
    if state == "unknown":
        what = "the sender has not said anything of it yet"
        return _Cause(what, aim="see", command="droprctl status")
    below = sorted(t for t in _map(status.get("paused")) if t.startswith(f"{peer}/"))
    if below:
        what = f"paused below it: {', '.join(below)}"
        return _Cause(what, aim="to go on", command=f"droprctl resume {below[0]}")
    if about["queued"]:
        error = about["last_error"]
        trouble = f", though a request was refused: {error}" if error else ""
        return _Cause("nothing holds it up: messages are on their way", trouble)
    return _Cause("nothing waits")


def _pause_of(status: Map, peer: str) -> dict[str, Any]:
    """The pause that holds `peer`: its own, or that of the whole node."""
    paused = _map(status.get("paused"))
    return _map(paused.get(peer) or paused.get(""))


def _pause_cause(status: Map, peer: str) -> _Cause:
    own = peer in _map(status.get("paused"))
    pause = _pause_of(status, peer)
    who = pause.get("who") or "somebody"
    subject = "it" if own else "the whole node"
    both = ", receiving too," if pause.get("receiving") is True else ""
    what = f"{subject} has been paused{both} by {who}"
    details = ""
    if isinstance(pause.get("until_wall_ns"), int):
        details += f", until {_local(status, pause['until_wall_ns'] / 1e9)}"
    if pause.get("reason"):
        details += f" ({pause['reason']})"
    command = f"droprctl resume {peer if own else ''}".rstrip()
    return _Cause(
        what,
        details,
        aim="to go on",
        command=command,
        since_s=_age_s(status, pause.get("since_wall_ns")),
    )


def _age_s(status: Map, wall_ns: Any) -> float | None:
    """How long before the status `wall_ns` was, in seconds."""
    if not isinstance(wall_ns, int):
        return None
    return max(0.0, round(_as_of_s(status) - wall_ns / 1e9, 1))


def _as_of_s(status: Map) -> float:
    text = str(status["as_of"]).replace("Z", "+00:00")
    return datetime.datetime.fromisoformat(text).timestamp()


def _local(status: Map, wall_s: float) -> str:
    """A time of day, local; with its date if that is not the day of the status."""
    when = datetime.datetime.fromtimestamp(wall_s).astimezone()
    today = datetime.datetime.fromtimestamp(_as_of_s(status)).astimezone().date()
    return when.strftime("%H:%M" if when.date() == today else "%Y-%m-%d %H:%M")


def _sentence(status: Map, peer: str, about: Map, cause: _Cause) -> str:
    queued = _count(about["queued"])
    if not cause.command:
        if not queued:
            return f"nothing waits for {peer}."
        way = "is on its way" if queued == 1 else "are on their way"
        return f"{_messages(queued)} for {peer} {way}{cause.details}."
    text = f"nothing waits for {peer}; " if not queued else ""
    if queued:
        text = f"{_messages(queued)} for {peer} {'waits' if queued == 1 else 'wait'}: "
    unmerged = _count(status.get("unmerged_bytes"))
    if unmerged and status.get("state") == "stopped":
        text = f"{text[:-2]}, not counting {unmerged} bytes that are not merged yet{text[-2:]}"
    text += cause.what
    if cause.since_s is not None:
        text += _since(status, cause.since_s)
    if cause.attempt:
        text += f" (attempt {cause.attempt})"
    text += cause.details
    if about["next_try_s"] is not None:
        text += f"; next try {_next(status, about['next_try_s'])}"
    return f"{text}; {cause.aim}: {cause.command}"


def _messages(count: int) -> str:
    return f"{count} message{'' if count == 1 else 's'}"


def _since(status: Map, age_s: float) -> str:
    if age_s < 1:
        return ""
    if age_s < 100:
        return f" for {duration(age_s)}"
    return f" since {_local(status, _as_of_s(status) - age_s)}"


def _next(status: Map, in_s: float) -> str:
    if in_s < 1:
        return "now"
    return f"in {duration(in_s)}" if in_s < 100 else f"at {_local(status, _as_of_s(status) + in_s)}"
