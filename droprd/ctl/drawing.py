"""Tables: drawn with rich on a terminal, plain columns anywhere else.

On a terminal too narrow for its columns a table becomes one line a cell, so that nothing is cut.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

LAST_COLUMN_MIN = 20  # the last column may be broken into lines of this width

_STYLES = {
    "running": "green",
    "open": "green",
    "ok": "green",
    "throttled": "yellow",
    "probing": "yellow",
    "paused": "yellow",
    "draining": "yellow",
    "warning": "yellow",
    "backoff": "red",
    "fatal": "red",
    "stopped": "red",
    "critical": "red",
    "unconfigured": "red",
}


def printable(text: str) -> str:
    """`text` without characters that could steer a terminal."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print `rows` under `header`; numbers to the right. Nothing if there are none."""
    if not rows:
        return
    cells = [[printable(cell) for cell in row] for row in rows]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(header))]
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb":
        _draw(header, cells, right)
        return
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    for row in [header, *cells]:
        parts = [
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(row, widths, right, strict=True)
        ]
        print("  ".join(parts).rstrip())


def _is_number(text: str) -> bool:
    return text == "-" or text[:1].isdigit()


def _draw(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[bool]) -> None:
    # Imported only when drawing: it takes longer than all the rest of droprctl.
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    needed = sum(widths[:-1]) + min(widths[-1], LAST_COLUMN_MIN) + 3 * len(header)
    if needed > console.width:
        for row in rows:
            for name, cell in zip(header, row, strict=True):
                if cell:
                    console.print(Text(f"{name}: ").append(cell, style=_STYLES.get(cell, "")))
            console.print()
        return
    drawn = Table(box=SIMPLE_HEAD, pad_edge=False)
    last = len(header) - 1
    for i, (name, to_right) in enumerate(zip(header, right, strict=True)):
        drawn.add_column(name, justify="right" if to_right else "left", no_wrap=i != last)
    for row in rows:
        drawn.add_row(*(Text(cell, style=_STYLES.get(cell, "")) for cell in row))
    console.print(drawn)
