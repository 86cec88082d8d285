"""Lines are cut where they end, whatever pieces they come in, and none waits for the next."""

from __future__ import annotations

import os

from hypothesis import given
from hypothesis import strategies as st

from droprd.ctl import send


@given(st.lists(st.binary(max_size=20).map(lambda b: b.replace(b"\n", b"")), max_size=20))
def test_lines_come_out_as_they_went_in(lines: list[bytes]) -> None:
    reading, writing = os.pipe()
    with open(writing, "wb") as file:
        file.write(b"\n".join(lines))
    try:
        found = [line for group in send.read_lines(reading) for line in group]
    finally:
        os.close(reading)
    # A last line without an end counts if there is anything in it.
    assert found == (lines[:-1] if lines and not lines[-1] else lines)


def test_a_line_does_not_wait_for_the_next_one() -> None:
    reading, writing = os.pipe()
    groups = send.read_lines(reading)
    os.write(writing, b"one\ntw")
    assert next(groups) == [b"one"]
    os.write(writing, b"o\n\nthr")
    assert next(groups) == [b"two", b""]
    os.close(writing)
    assert list(groups) == [[b"thr"]]
    os.close(reading)
