"""Which droprd this is."""

from __future__ import annotations


def version() -> str:
    """The version of the installed package; "unknown" when run from a tree without one."""
    from importlib import metadata  # takes longer than a whole `droprctl retry`

    try:
        return metadata.version("droprd")
    except metadata.PackageNotFoundError:
        return "unknown"
