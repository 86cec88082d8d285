from __future__ import annotations

import os
from pathlib import Path

from droprd.spool import bells
from droprd.spool.hearsay import Hearsay, read_bell
from droprd.spool.layout import Layout


def spool_with_bell(tmp_path: Path) -> Layout:
    (tmp_path / "outbox").mkdir()
    layout = Layout(str(tmp_path))
    os.mkfifo(layout.bell)
    return layout


def test_the_sender_learns_who_called_and_whether_a_producer_rang(tmp_path: Path) -> None:
    layout = spool_with_bell(tmp_path)
    bell = bells.listen(layout.bell)
    hearsay = Hearsay(layout, lambda: 0.0)
    ringer = bells.Bell(layout.bell)
    ringer.ring()
    hearsay.hear("berlin")
    hearsay.hear("paris")
    ringer.ring()
    assert read_bell(bell) == (True, {"berlin", "paris"})
    assert read_bell(bell) == (False, set())
    ringer.ring()
    assert read_bell(bell) == (True, set())
    hearsay.close()
    ringer.close()
    os.close(bell)


def test_a_peer_is_told_of_at_most_once_a_second(tmp_path: Path) -> None:
    layout = spool_with_bell(tmp_path)
    bell = bells.listen(layout.bell)
    now = [0.0]
    hearsay = Hearsay(layout, lambda: now[0])
    hearsay.hear("berlin")
    assert read_bell(bell) == (False, {"berlin"})
    hearsay.hear("berlin")
    assert read_bell(bell) == (False, set())
    now[0] = 1.5
    hearsay.hear("berlin")
    assert read_bell(bell) == (False, {"berlin"})
    hearsay.close()
    os.close(bell)


def test_what_is_no_name_is_passed_over(tmp_path: Path) -> None:
    layout = spool_with_bell(tmp_path)
    bell = bells.listen(layout.bell)
    os.write(bell, b"\n../x\n\n\0\xff\xfe\nberlin\n")
    assert read_bell(bell) == (True, {"berlin"})
    os.close(bell)


def test_nobody_listening_is_no_error_and_a_later_listener_is_found(tmp_path: Path) -> None:
    layout = spool_with_bell(tmp_path)
    now = [0.0]
    hearsay = Hearsay(layout, lambda: now[0])
    hearsay.hear("berlin")
    bell = bells.listen(layout.bell)
    now[0] = 2.0
    hearsay.hear("berlin")
    assert read_bell(bell) == (False, {"berlin"})
    os.close(bell)
    now[0] = 4.0
    hearsay.hear("berlin")
    bell = bells.listen(layout.bell)
    now[0] = 6.0
    hearsay.hear("berlin")
    assert read_bell(bell) == (False, {"berlin"})
    hearsay.close()
    os.close(bell)
