"""droprctl: global options, the table of commands, and what every error becomes.

A command's module is imported when it is called, so that `droprctl status` starts in a fraction of
a second. Errors go to stderr: what, why, and the next command to type; with --json as one object
with the stable `code`. Exit codes:

    0 done    1 failed    2 usage    3 no daemon    4 partly    130 interrupted
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

try:
    import json

    import click

    from droprd.ctl.session import (
        EXIT_FAILED,
        EXIT_INTERRUPTED,
        EXIT_USAGE,
        Session,
        duration,
        exit_code,
    )
    from droprd.errors import DroprdError
except KeyboardInterrupt:  # these take most of the time that a start takes
    sys.exit(130)

# command → (module, attribute, one line of help), in the order of `droprctl --help`.
COMMANDS: dict[str, tuple[str, str, str]] = {
    "status": ("show", "status", "What the node, its workers, peers and channels do."),
    "why": ("show", "why", "Why messages to a peer do not move, and what to do."),
    "health": ("show", "health", "Whether all is well: exit 0 or 1, 3 without a daemon."),
    "send": ("send", "send", "Hand over messages for a peer."),
    "receive": ("receive", "receive", "Take messages out of a channel."),
    "retry": ("flow", "retry", "Try a peer now."),
    "pause": ("flow", "pause", "Stop sending to a target until it is resumed."),
    "resume": ("flow", "resume", "Lift pauses and drains."),
    "drain": ("flow", "drain", "Refuse new messages and wait until the old ones are delivered."),
    "list": ("messages", "list_messages", "List messages that wait, or dead letters."),
    "cat": ("messages", "cat", "Write the body of a message."),
    "trace": ("messages", "trace", "Tell where a message is, and every step it took."),
    "requeue": ("fix", "requeue", "Send dead letters, or sent messages, again."),
    "purge": ("fix", "purge", "Delete messages."),
    "init": ("init", "init", "Make a new node: configuration, keys and spool."),
    "peer": ("peer", "peer", "Add, list, remove and reset peers."),
    "config": ("config", "config", "Check and show the configuration."),
    "fsck": ("fsck", "fsck", "Check every file of the spool."),
    "reload": ("daemon", "reload", "Let the daemon read its configuration again."),
    "restart": ("daemon", "restart", "Replace the workers by new ones, gracefully."),
    "stop": ("daemon", "stop", "Stop the daemon."),
    "completion": ("completion", "completion", "Print the completion script of a shell."),
}


class _Commands(click.Group):
    """The group whose commands are imported when they are needed."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute, _ = COMMANDS[cmd_name]
        command = getattr(importlib.import_module(f"droprd.ctl.{module}"), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "see `droprctl --help`"
            raise click.UsageError(f"there is no command {args[0]!r}; {hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in COMMANDS.items()])


def _print_version(ctx: click.Context, _option: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        from droprd.ctl.version import version

        click.echo(f"droprctl {version()}")
        ctx.exit()


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.option("-C", "directory", metavar="DIR", help="The node in DIR: --config DIR/droprd.toml.")
@click.option("--config", "config_file", metavar="FILE", help="The node's configuration.")
@click.option(
    "--timeout",
    "timeout_s",
    callback=duration,
    metavar="TIME",
    help="How long the daemon may take to answer. [5s]",
)
@click.option("-q", "--quiet", is_flag=True, help="No prose; results and errors only.")
@click.option("--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version)
@click.pass_context
def cli(
    ctx: click.Context,
    directory: str | None,
    config_file: str | None,
    timeout_s: float | None,
    quiet: bool,
) -> None:
    """Look at and steer a droprd node.

    The node is named by -C, --config or $DROPRD_CONFIG, else it is /etc/droprd/droprd.toml.
    A TARGET is PEER[/CHANNEL[/PRIORITY]]; a TIME is 90, 10m or 2h.
    """
    if directory is not None and config_file is not None:
        raise click.UsageError("-C and --config name the same thing; give one of them")
    if directory is not None and os.path.isfile(directory):
        raise click.UsageError(f"-C takes a directory, {directory} is a file: use --config")
    if config_file is not None and os.path.isdir(config_file):
        raise click.UsageError(f"--config takes a file, {config_file} is a directory: use -C")
    if directory is not None:
        config_file = os.path.join(directory, "droprd.toml")
    ctx.obj = Session(config_file=config_file, timeout_given_s=timeout_s, quiet=quiet)


def _report(error: DroprdError, as_json: bool) -> None:
    faults = list(getattr(error, "faults", ()))
    if as_json:
        document: dict[str, Any] = {
            "schema": 1,
            "code": error.code,
            "what": error.what,
            "why": error.why,
            "hint": error.hint,
        }
        if faults:
            document["faults"] = faults
        ids = getattr(error, "ids", ())
        if ids:
            document["ids"] = list(ids)
        print(json.dumps(document, ensure_ascii=False), file=sys.stderr)
        return
    # The faults that a daemon found in its configuration come as lines of `why`.
    why, *lines = error.why.split("\n")
    if lines:
        why, lines = "", [why, *lines]
    print(f"droprctl: {error.what}" + (f": {why}" if why else ""), file=sys.stderr)
    for fault in (*lines, *faults):
        print(f"  {fault}", file=sys.stderr)
    if error.hint:
        print(f"  {error.hint}", file=sys.stderr)


def run(arguments: Sequence[str]) -> int:
    """Carry out one command line and return its exit code."""
    # The option itself may stand behind what is at fault, so it is looked for in the words.
    words = list(arguments)
    as_json = "--json" in words[: words.index("--") if "--" in words else len(words)]
    try:
        code = cli.main(args=words, prog_name="droprctl", standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return EXIT_USAGE
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx is not None else "droprctl"
        _report(
            DroprdError(error.format_message(), hint=f"see `{where} --help`", code="usage"), as_json
        )
        return EXIT_USAGE
    except click.ClickException as error:
        _report(DroprdError(error.format_message()), as_json)
        return EXIT_FAILED
    except (click.Abort, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    except DroprdError as error:
        _report(error, as_json)
        return exit_code(error)
    except BrokenPipeError:
        # Whoever read our output has gone: nothing can be told to them any more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except OSError as error:
        path = f"{error.filename}: " if error.filename else ""
        hint = "run this as the owner of the spool, or as root"
        _report(
            DroprdError(
                "the system refused",
                why=f"{path}{error.strerror or error}",
                hint=hint if isinstance(error, PermissionError) else "",
                code="system",
            ),
            as_json,
        )
        return EXIT_FAILED
    return code if isinstance(code, int) else 0


def main() -> NoReturn:
    """The program droprctl."""
    code = run(sys.argv[1:])
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or EXIT_FAILED
    sys.exit(code)


if __name__ == "__main__":
    main()
