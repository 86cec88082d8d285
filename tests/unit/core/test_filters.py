"""Selections travel whole, and nothing that is none is taken for one."""

from __future__ import annotations

import pytest

from droprd.core.filters import (
    IDS_A_CALL,
    Selection,
    compile_reason,
    from_map,
    raw_id,
    text_id,
    with_target,
)
from droprd.core.rpc import CALL_BYTES_MAX, Request, encode
from droprd.errors import BadData, InvalidName, UsageError

ID = "0199c5d2-5cb4-7bd1-a5d0-7a6a1e2c0001"


def test_a_selection_is_the_same_after_its_way_through_a_call() -> None:
    full = Selection(
        what="dead",
        box="inbox",
        peer="berlin",
        channel="sites",
        priority=3,
        ids=frozenset((raw_id(ID),)),
        reason=compile_reason("no such"),
        older_ms=10,
        newer_ms=20,
    )
    for one in (full, Selection(), Selection(peer="berlin")):
        assert from_map(one.as_map()) == one


def test_as_many_ids_as_a_call_may_have_fit_into_it() -> None:
    ids = frozenset(n.to_bytes(16, "big") for n in range(IDS_A_CALL))
    request = Request(1, "fix", {"selection": Selection(ids=ids).as_map()})
    assert len(encode(request)) < CALL_BYTES_MAX


def test_ids_read_back_as_they_were_written() -> None:
    assert text_id(raw_id(ID)) == ID
    with pytest.raises(UsageError):
        raw_id("berlin")


@pytest.mark.parametrize("target", ["a/b/c", "a/b/10", "a/b/1/2", "A", "a//1"])
def test_what_is_no_target_is_refused(target: str) -> None:
    with pytest.raises((UsageError, InvalidName)):
        with_target(Selection(), target)


@pytest.mark.parametrize(
    "found",
    [
        None,
        {"what": "all"},
        {"box": "mail"},
        {"peer": "../x"},
        {"ids": [b"short"]},
        {"ids": [bytes(16)] * (IDS_A_CALL + 1)},
        {"older_ms": -1},
        {"reason": 5},
    ],
)
def test_what_is_no_selection_is_refused(found: object) -> None:
    with pytest.raises(BadData):
        from_map(found)


def test_a_bad_regular_expression_is_a_usage_error() -> None:
    with pytest.raises(UsageError):
        compile_reason("(")


def test_the_log_is_told_what_was_meant_and_no_ids() -> None:
    one = Selection(what="dead", peer="berlin", ids=frozenset((raw_id(ID),)))
    assert one.summary() == "both boxes, dead, berlin, 1 ids"
