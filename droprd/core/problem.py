"""The body of an answer that refuses: RFC 9457 problem details, with droprd's own `code`.

Guarantees: what is decoded has printable, bounded texts, whoever sent it; a body that is no problem
document decodes to None, because the status alone says what to do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

CONTENT_TYPE = "application/problem+json"
_TEXT_MAX = 500


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a request was refused.

    Attributes:
        status: of the HTTP answer.
        code: stable, for programs; docs/wire.md lists them.
        title: the kind in a few words.
        detail: this case, for people.
    """

    status: int
    code: str
    title: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.status} {self.title}" + (f": {self.detail}" if self.detail else "")


def encode_problem(problem: Problem) -> bytes:
    """The JSON body."""
    data: dict[str, object] = {
        "type": f"urn:droprd:problem:{problem.code}",
        "title": problem.title,
        "status": problem.status,
        "code": problem.code,
    }
    if problem.detail:
        data["detail"] = problem.detail
    return json.dumps(data).encode()


def decode_problem(status: int, body: bytes) -> Problem | None:
    """The problem in `body`, None if it holds none."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(data, dict):
        return None
    texts: list[str] = []
    for key in ("code", "title", "detail"):
        text = data.get(key, "")
        if not isinstance(text, str):
            return None
        texts.append("".join(c if c.isprintable() else "?" for c in text[:_TEXT_MAX]))
    code, title, detail = texts
    if not code:
        return None
    return Problem(status, code, title, detail)
