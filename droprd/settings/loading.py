"""Reading the configuration: files and environment in, settings or all faults out.

The main file, `peers.d/*.toml` beside it, and the environment (`DROPRD_NODE__NAME=…`), which wins,
are merged and checked by `droprd.settings.schema`. Every fault is one line, "PATH:KEY: what is
wrong", with the nearest known key where one is misspelt; all of them are reported at once.
Relative paths, those in `peers.d` too, are relative to the main file's directory.

`python -m droprd.settings.loading --config FILE --emit` is the configuration child of the angel:
it writes msgpack {"ok": settings} or {"faults": [text, …]} (with code, what and hint where it is
not config_invalid) to stdout and exits 0 or 78 (EX_CONFIG, sysexits.h). It writes no file.
`load` raises ConfigError.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import difflib
import os
import re
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgpack
from pydantic import ValidationError

from droprd.errors import ConfigError, DroprdError
from droprd.settings import addresses, schema
from droprd.settings.values import Settings

EXIT_CONFIG = 78
ENVIRONMENT_PREFIX = "DROPRD_"
_TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}\Z")  # what RFC 6750 calls b64token, long enough

KeyPath = tuple[str, ...]


class _Sources:
    """Where every key was read, so that a fault can name its place."""

    def __init__(self, main_file: str) -> None:
        self.main_file = main_file
        self.places: dict[KeyPath, str] = {}
        self.faults: list[str] = []

    def note(self, place: str, table: Mapping[str, Any], above: KeyPath = ()) -> None:
        for key, value in table.items():
            path = (*above, key)
            self.places[path] = place
            if isinstance(value, Mapping):
                self.note(place, value, path)

    def place(self, path: KeyPath) -> str:
        """The file of the longest known part of `path`."""
        for length in range(len(path), 0, -1):
            found = self.places.get(path[:length])
            if found is not None:
                return found
        return self.main_file

    def fault(self, path: KeyPath, text: str) -> None:
        place = self.place(path)
        if place.startswith("environment "):
            line = f"{place}: {text}"
        else:
            line = f"{place}:{'.'.join(path)}: {text}" if path else f"{place}: {text}"
        if line not in self.faults:
            self.faults.append(line)


def load(config_file: str, environ: Mapping[str, str] | None = None) -> Settings:
    """The settings that `config_file`, `peers.d` beside it and the environment make together.

    Raises: ConfigError; `faults` has all that is wrong.
    """
    environ = os.environ if environ is None else environ
    config_file = os.path.abspath(config_file)
    sources = _Sources(config_file)
    files = _read_files(sources)
    environment = _read_environment(sources, environ)
    settings: Settings | None = None
    try:
        found = schema.read(files, environment)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        for one in faults:
            _explain(sources, one)
        sound = _sound_part(files, environment, [fault["loc"] for fault in faults])
        if sound is not None:
            _check_values(sources, _to_settings(config_file, sound), is_whole=False)
    else:
        settings = _to_settings(config_file, found)
        _check_values(sources, settings)
    if sources.faults or settings is None:
        count = len(sources.faults)
        raise ConfigError(
            f"the configuration cannot be used: {count} fault{'s' if count != 1 else ''}",
            faults=sources.faults,
        )
    return settings


# -- reading -----------------------------------------------------------------------------------


def _read_toml(sources: _Sources, path: str) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration at {path}",
            faults=[f"{path}: no such file"],
            hint="make one with `droprctl init`, or name another with --config",
            code="config_missing",
        ) from None
    except OSError as error:
        sources.faults.append(f"{path}: cannot be read: {error.strerror}")
    except UnicodeDecodeError as error:
        sources.faults.append(f"{path}: is no UTF-8 text at byte {error.start}")
    except tomllib.TOMLDecodeError as error:
        sources.faults.append(f"{path}: is no TOML: {error}")
    return {}


def _read_files(sources: _Sources) -> dict[str, Any]:
    merged = _read_toml(sources, sources.main_file)
    sources.note(sources.main_file, merged)
    beside = Path(sources.main_file).parent / "peers.d"
    try:
        names = sorted(p.name for p in beside.iterdir())
    except FileNotFoundError:
        names = []
    except OSError as error:
        sources.faults.append(f"{beside}: cannot be read: {error.strerror}")
        names = []
    for name in names:
        if not name.endswith(".toml") or name.startswith("."):
            continue
        place = str(beside / name)
        table = _read_toml(sources, place)
        for key in table:
            if key != "peers":
                sources.faults.append(f"{place}:{key}: only [peers.NAME] tables belong here")
        peers = table.get("peers", {})
        if not isinstance(peers, dict):
            sources.faults.append(f"{place}:peers: is no table")
            continue
        _merge_peers(sources, merged, place, peers)
    return merged


def _merge_peers(
    sources: _Sources, merged: dict[str, Any], place: str, peers: dict[str, Any]
) -> None:
    known = merged.setdefault("peers", {})
    if not isinstance(known, dict):
        return  # a fault of the main file, found by the schema
    for peer, value in peers.items():
        path = ("peers", peer)
        if peer in known:
            sources.faults.append(
                f"{place}:peers.{peer}: this peer is also in {sources.place(path)}; keep one"
            )
            continue
        known[peer] = value
        sources.note(place, {"peers": {peer: value}})


def _read_environment(sources: _Sources, environ: Mapping[str, str]) -> dict[str, Any]:
    """DROPRD_SECTION__KEY and DROPRD_PEERS__NAME__KEY as nested maps, unchecked."""
    found: dict[str, Any] = {}
    sections = [*schema.SECTIONS, *schema.TABLES]
    for variable in sorted(environ):
        if not variable.startswith(ENVIRONMENT_PREFIX):
            continue
        path = tuple(variable.removeprefix(ENVIRONMENT_PREFIX).lower().split("__"))
        if len(path) == 1:
            for section in sections:
                if path[0].startswith(f"{section}_"):
                    rest = path[0].removeprefix(f"{section}_").upper()
                    sources.faults.append(
                        f"environment {variable}: two underscores stand between the parts; "
                        f"did you mean {ENVIRONMENT_PREFIX}{section.upper()}__{rest}?"
                    )
            continue
        table = found
        for key in path[:-1]:
            below = table.setdefault(key, {})
            if not isinstance(below, dict):
                below = table[key] = {}
            table = below
            sources.places.setdefault(path[: path.index(key) + 1], f"environment {variable}")
        table[path[-1]] = environ[variable]
        sources.places[path] = f"environment {variable}"
    return found


# -- faults ------------------------------------------------------------------------------------


def _known_keys(above: KeyPath) -> list[str]:
    """The keys that may stand in the table `above`."""
    if not above:
        return [*schema.SECTIONS, *schema.TABLES]
    model = schema.SECTIONS.get(above[0]) if len(above) == 1 else None
    if model is None and len(above) == 2:
        model = schema.TABLES.get(above[0])
    return list(model.model_fields) if model is not None else []


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """ "; did you mean X?" for the nearest of `known`, or what there is, or nothing."""
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known are {', '.join(known)}" if known else ""


_PLAIN = {
    "missing": "is missing",
    "model_type": "is no table",
    "model_attributes_type": "is no table",
    "dict_type": "is no table",
    "string_type": "is no text",
    "list_type": "is no list",
    "int_type": "is no whole number",
    "int_parsing": "is no whole number",
    "int_from_float": "is no whole number",
    "float_type": "is no number",
    "bool_type": "is neither true nor false",
    "bool_parsing": "is neither true nor false",
    "string_too_short": "is empty",
    "string_pattern_mismatch": "contains a character that no path can have",
}


def _explain(sources: _Sources, error: Mapping[str, Any]) -> None:
    """Turn one of pydantic's errors into a fault."""
    path = tuple(str(part) for part in error["loc"] if part != "[key]")
    # A fault of peer_defaults comes back from every peer that took it over: say it once.
    if len(path) > 2 and path[0] == "peers" and path[:3] not in sources.places:
        path = ("peer_defaults", *path[2:])
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        text = f"is not known{did_you_mean(path[-1], _known_keys(path[:-1]))}"
    elif kind == "value_error":
        fault = context["error"]
        text = f"{fault.what}; {fault.hint}" if isinstance(fault, DroprdError) else str(fault)
    elif kind == "literal_error":
        text = f"must be {context['expected']}"
    elif kind in ("greater_than_equal", "less_than_equal"):
        bound, limit = ("least", "ge") if "ge" in context else ("most", "le")
        text = f"must be at {bound} {context[limit]:g}"
        if float(context[limit]) != float(f"{context[limit]:g}"):
            text = f"must be at {bound} {context[limit]}"
    else:
        text = _PLAIN.get(kind, str(error["msg"]))
    if kind == "missing" and path == ("node",):
        path, text = ("node", "name"), "is missing: this node needs a name"
    sources.fault(path, text)


# -- checks on the whole -----------------------------------------------------------------------


def _sound_part(
    files: dict[str, Any], environment: dict[str, Any], places: Sequence[Sequence[int | str]]
) -> schema.Configuration | None:
    """What is left without the values at `places`, so that all faults are told at once.

    None where even the rest makes no configuration.
    """
    sources = copy.deepcopy((files, environment))
    for place in places:
        for table in sources:
            _cut(table, [str(part) for part in place if part != "[key]"])
    node = sources[0].get("node", {})
    sources[0]["node"] = {"name": "unnamed", **node} if isinstance(node, dict) else {}
    try:
        return schema.read(*sources)
    except ValidationError:
        return None


def _cut(table: dict[str, Any], path: Sequence[str]) -> None:
    """Take the value at `path` out, or the one that holds it if that is no table."""
    for key in path[:-1]:
        below = table.get(key)
        if not isinstance(below, dict):
            table.pop(key, None)
            return
        table = below
    table.pop(path[-1], None)


def _to_settings(config_file: str, found: schema.Configuration) -> Settings:
    """Plain values, with absolute paths."""
    base = os.path.dirname(config_file)
    data = found.model_dump(mode="python", exclude={"peer_defaults"})
    data["config_file"] = config_file
    settings = Settings.from_dict(data)
    peers = {
        name: dataclasses.replace(
            peer,
            token_file=os.path.join(base, peer.token_file) if peer.token_file else "",
        )
        for name, peer in settings.peers.items()
    }

    def absolute(text: str) -> str:
        path = text.removeprefix("unix:")
        return text if path == text else f"unix:{os.path.join(base, path)}"

    listen = tuple(absolute(text) for text in settings.receiver.listen)
    return dataclasses.replace(
        settings,
        node=dataclasses.replace(settings.node, spool=os.path.join(base, settings.node.spool)),
        control=dataclasses.replace(
            settings.control, socket=os.path.join(base, settings.control.socket)
        ),
        receiver=dataclasses.replace(settings.receiver, listen=listen),
        monitor=dataclasses.replace(settings.monitor, listen=absolute(settings.monitor.listen)),
        peers=peers,
    )


def _sockets(settings: Settings) -> Iterator[tuple[KeyPath, str]]:
    yield ("control", "socket"), settings.control.socket
    for text in settings.receiver.listen:
        if text.startswith("unix:"):
            yield ("receiver", "listen"), text.removeprefix("unix:")
    if settings.monitor.listen.startswith("unix:"):
        yield ("monitor", "listen"), settings.monitor.listen.removeprefix("unix:")


def _check_values(sources: _Sources, settings: Settings, *, is_whole: bool = True) -> None:
    """The checks that take more than one value. Of what is not whole, nothing is missed."""
    for path, socket in _sockets(settings):
        if len(os.fsencode(socket)) > addresses.SOCKET_PATH_BYTES_MAX:
            sources.fault(
                path,
                f"a socket's path has at most {addresses.SOCKET_PATH_BYTES_MAX} bytes, "
                f"{socket} has {len(os.fsencode(socket))}",
            )
    owners: dict[str, str] = {}
    for name, peer in settings.peers.items():
        path = ("peers", name, "token_file")
        if not peer.token_file:
            schemes = {url.partition(":")[0] for url in peer.addresses}
            if is_whole and schemes <= set(addresses.SCHEMES):
                sources.fault(
                    ("peers", name),
                    "has no token_file; `droprctl peer add` makes one, or write the token that "
                    "both nodes share into a file",
                )
            continue
        token = _read_token(sources, path, peer.token_file)
        if token is None:
            continue
        if token in owners:
            sources.fault(path, f"is the same token as that of {owners[token]!r}")
        owners.setdefault(token, name)


def _read_token(sources: _Sources, path: KeyPath, file: str) -> str | None:
    try:
        with open(file, encoding="ascii") as opened:
            token = opened.read(1024).strip()
    except OSError as error:
        sources.fault(path, f"{file} cannot be read: {error.strerror}")
        return None
    except UnicodeDecodeError:
        token = ""
    if not _TOKEN.match(token):
        sources.fault(path, f"{file} holds no token: 16 to 512 of A-Z a-z 0-9 . _ ~ + / = -")
        return None
    return token


# -- the configuration child -------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the configuration; exit status 0 or 78."""
    parser = argparse.ArgumentParser(prog="python -m droprd.settings.loading")
    parser.add_argument("--config", required=True)
    parser.add_argument("--emit", action="store_true", help="write msgpack to stdout")
    options = parser.parse_args(arguments)
    answer: dict[str, Any]
    try:
        answer = {"ok": load(options.config).to_dict()}
    except ConfigError as error:
        answer = {"faults": list(error.faults) or [str(error)]}
        if error.code != ConfigError.code:
            answer |= {"code": error.code, "what": error.what, "hint": error.hint}
        if not options.emit:
            print(error, file=sys.stderr)
    if options.emit:
        sys.stdout.buffer.write(msgpack.packb(answer))
        sys.stdout.buffer.flush()
    return 0 if "ok" in answer else EXIT_CONFIG


if __name__ == "__main__":
    sys.exit(main())
