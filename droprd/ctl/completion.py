"""droprctl completion: the script that teaches a shell to complete droprctl's words."""

from __future__ import annotations

import click

from droprd.ctl.session import Session, json_option

SHELLS = ("bash", "zsh", "fish")
VARIABLE = "_DROPRCTL_COMPLETE"


@click.command(short_help="Print the completion script of a shell.")
@click.argument("shell", type=click.Choice(SHELLS))
@json_option
@click.pass_obj
def completion(session: Session, shell: str) -> None:
    """Print the script that lets SHELL complete commands and options.

    \b
    droprctl completion bash > /etc/bash_completion.d/droprctl
    droprctl completion zsh  > /usr/share/zsh/site-functions/_droprctl
    droprctl completion fish > ~/.config/fish/completions/droprctl.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    root = click.get_current_context().find_root().command
    # Not `source()`: that of bash runs bash, to warn of versions older than 4.4.
    made = kind(root, {}, "droprctl", VARIABLE)
    script = made.source_template % made.source_vars()
    if session.as_json:
        session.emit({"shell": shell, "script": script})
    else:
        print(script)
