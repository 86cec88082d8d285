from __future__ import annotations

import pytest

from droprd.core.judgement import Judgement, judge


@pytest.mark.parametrize("status", [200, 409])
def test_an_answer_is_read(status: int) -> None:
    assert judge(status) is Judgement.ANSWERED


@pytest.mark.parametrize("status", [429, 503, 507])
def test_a_refusal_for_now_concerns_the_whole_peer(status: int) -> None:
    assert judge(status) is Judgement.WAIT


@pytest.mark.parametrize("status", [400, 410, 422, 431, 500, 501])
def test_what_a_single_message_may_have_caused_is_not_held_against_the_peer(status: int) -> None:
    assert judge(status) is Judgement.BLAMED


@pytest.mark.parametrize("status", [204, 301, 302, 401, 403, 404, 405, 502, 504])
def test_what_no_receiver_of_ours_answers_is_another_server(status: int) -> None:
    assert judge(status) is Judgement.UNREACHABLE


@pytest.mark.parametrize("status", [408, 413])
def test_too_much_at_once_is_sent_in_smaller_pieces(status: int) -> None:
    assert judge(status) is Judgement.SMALLER


def test_every_status_has_a_judgement() -> None:
    assert all(judge(status) in Judgement for status in (*range(100, 600), 0, 999))
