"""Judgement: what an HTTP status says about the peer, about the request, and what follows.

One table decides it, so that a poison message is never taken for a broken peer, nor the reverse.
BLAMED means: some lane of this request is at fault, or might be. The sender then sends the lanes
of that request one by one, and a lane that is blamed alone waits alone. A peer that blames
whatever it is sent is unreachable after all: `BLAMED_IN_A_ROW_MAX`.

Pure.
"""

from __future__ import annotations

from enum import Enum

BLAMED_IN_A_ROW_MAX = 4


class Judgement(Enum):
    """What to make of an answer."""

    ANSWERED = "the body is the answer"
    WAIT = "the peer waits, as long as Retry-After says"
    SMALLER = "too much for it at once"
    UNREACHABLE = "this address does not lead to a receiver that lets us in"
    BLAMED = "something in this request is at fault"


_BY_STATUS = {
    401: Judgement.UNREACHABLE,
    403: Judgement.UNREACHABLE,
    404: Judgement.UNREACHABLE,
    405: Judgement.UNREACHABLE,
    407: Judgement.UNREACHABLE,
    408: Judgement.SMALLER,
    413: Judgement.SMALLER,
    421: Judgement.UNREACHABLE,
    426: Judgement.UNREACHABLE,
    429: Judgement.WAIT,
    502: Judgement.UNREACHABLE,
    503: Judgement.WAIT,
    504: Judgement.UNREACHABLE,
    505: Judgement.UNREACHABLE,
    507: Judgement.WAIT,
}


def judge(status: int) -> Judgement:
    """What an answer with this status means. 409 is an answer: it says how much is there."""
    if status == 200 or status == 409:
        return Judgement.ANSWERED
    known = _BY_STATUS.get(status)
    if known is not None:
        return known
    # 400 and 500 above all. Anything that is no error (204, 302) comes from something else.
    return Judgement.BLAMED if status >= 400 else Judgement.UNREACHABLE
