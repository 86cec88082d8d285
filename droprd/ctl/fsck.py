"""droprctl fsck: check every file of the spool against the table in docs/spool.md."""

from __future__ import annotations

import click

from droprd.ctl.drawing import printable
from droprd.ctl.session import EXIT_DONE, EXIT_FAILED, Session, json_option


@click.command()
@json_option
@click.pass_obj
def fsck(session: Session) -> int:
    """Check every file of the spool; changes nothing. Exit 1 if something is wrong."""
    from droprd.spool.fsck import check_spool
    from droprd.spool.fsops import OsFs

    report = check_spool(OsFs(), session.node().spool)
    if session.as_json:
        session.emit(report.to_dict())
    else:
        for finding in report.findings:
            print(printable(str(finding)))
        session.say(report.summary())
    return EXIT_DONE if report.ok else EXIT_FAILED
