"""droprctl why ID: what became of one message, why it waits, and what can be done.

Of a message that waits for a peer, the answer is the peer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from droprd.ctl.messages import trace_document
from droprd.ctl.session import EXIT_DONE, Session

Ask = Callable[[str], tuple[Mapping[str, Any], int]]

_TEXTS = {
    "sent": ("it was delivered to {lane}", "to send it again", "droprctl requeue {id} --sent"),
    "dead": ("it is a dead letter of {lane}: {reason}", "to try again", "droprctl requeue {id}"),
    "ready": ("it waits for a consumer of {channel}", "see", "droprctl status"),
    "delayed": ("it waits until its delay is over, then for a consumer of {channel}", "", ""),
    "leased": ("a consumer of {channel} holds it", "see", "droprctl trace {id}"),
    "purged": ("an operator purged it", "", ""),
    "expired": ("its time to live ended before it was delivered", "", ""),
}


def why_message(session: Session, message_id: str, ask: Ask) -> tuple[dict[str, Any], int]:
    """{id, state, peer, lane, cause, command, text}, and the exit code. `ask(peer)` says why the
    messages of a peer wait. Raises: DroprdError if the message is not here."""
    found = trace_document(session, message_id)
    state, lane = found["state"], found["lane"]
    peer, channel, _ = lane.split("/")
    about = {"id": found["id"], "state": state, "peer": peer, "lane": lane}
    if state == "waiting":
        answer, code = ask(peer)
        text = f"{found['id']} waits for {lane}: {answer['text']}"
        more = {"cause": answer["cause"], "command": answer["command"], "text": text}
        return {**about, **more}, code
    cause, aim, command = _TEXTS.get(state, ("it ended: " + state, "", ""))
    cause = cause.format(lane=lane, channel=channel, reason=found["reason"])
    command = command.format(id=found["id"])
    text = f"{found['id']}: {cause}" + (f"; {aim}: {command}" if command else ".")
    return {**about, "cause": cause, "command": command, "text": text}, EXIT_DONE
