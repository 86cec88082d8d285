"""A log line for each change of a peer's state, and for nothing else."""

from __future__ import annotations

import logging

import pytest

from droprd.workers.statelog import PeerStates

TROUBLE = ("throttled", "connection refused")


def test_one_line_when_a_peer_is_lost_and_one_when_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    states = PeerStates()
    for one in (("open", ""), *[TROUBLE, ("probing", "connection refused")] * 50, ("open", "")):
        states.look({"berlin": one, "kiel": ("open", "")})
    assert caplog.messages == ["peer not reached", "peer reached again"]
    assert vars(caplog.records[0])["fields"] == {"peer": "berlin", "why": "connection refused"}


def test_a_pause_ends_no_trouble_and_a_removed_peer_is_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    states = PeerStates()
    for one in (TROUBLE, ("paused", ""), TROUBLE):
        states.look({"berlin": one})
    assert caplog.messages == ["peer not reached"]
    states.look({})
    states.look({"berlin": ("open", "")})
    assert caplog.messages == ["peer not reached"]
