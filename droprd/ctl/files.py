"""Writing configuration files: TOML text, whole or not at all, with the right owner and mode.

A crash leaves the old file or the new one, never half of one; at worst a NAME.new beside it, which
the next write replaces. Raises OSError.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from droprd.spool.fsops import OsFs

_CONTROL = {i: f"\\u{i:04x}" for i in (*range(32), 127)}


def toml_value(value: Any) -> str:
    """A text, truth value, number or list of them as TOML (https://toml.io/en/v1.0.0)."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        # JSON's escapes are those of TOML's basic strings, but for DEL.
        return json.dumps(value, ensure_ascii=False).translate(_CONTROL)
    return "[" + ", ".join(toml_value(one) for one in value) + "]"


def toml_table(name: str, values: Mapping[str, Any]) -> str:
    """A table with its header."""
    parts = [
        part if part.replace("-", "").replace("_", "").isalnum() else toml_value(part)
        for part in name.split("/")
    ]
    lines = [f"[{'.'.join(parts)}]"]
    lines += [f"{key} = {toml_value(value)}" for key, value in values.items()]
    return "\n".join(lines) + "\n"


def write_new(path: str, text: str, mode: int, owner: tuple[int, int] | None = None) -> None:
    """Make the file `path`; FileExistsError if there is one. `owner` is (uid, gid)."""
    fs = OsFs()
    temporary = f"{path}.new"
    if fs.stat(temporary) is not None:
        fs.unlink(temporary)
    fd = fs.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    try:
        if owner is not None:
            os.fchown(fd, *owner)
        fs.write_at(fd, [text.encode()], 0)
        fs.sync(fd, "ctl.write")
        # If we stop here: the temporary file is left, and replaced by the next write.
        # link(2), not rename(2): it refuses to replace what is there.
        os.link(temporary, path)
    finally:
        fs.close(fd)
        fs.unlink(temporary)
    sync_dir(os.path.dirname(path))


def sync_dir(path: str) -> None:
    """Bring the names in a directory to stable storage."""
    OsFs().sync_dir(path, "ctl.dir")
