"""The page of all commands, made from the commands themselves."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import cleandoc

import click

from tieredlimit.cli import main

HEAD = """\
# Commands

<!-- Made from the commands themselves by `scripts/docs write`: change their help texts. -->

Every command with its options, as `--help` has them. What they are for, and what they print, is
told in [the operator's commands](../commands.md) and, as a story, in
[the operator's night](../handbook.md).
"""


def page() -> str:
    """Return the page."""
    parts = [HEAD, *_command(main, None, "tieredlimit", 2)]
    return "\n".join(parts)


def _command(
    command: click.Command, parent: click.Context | None, name: str, level: int
) -> Iterator[str]:
    # The width is that of the help texts' own lines, whatever terminal this runs in.
    context = click.Context(command, info_name=name, parent=parent)
    yield f"{'#' * level} {context.command_path}\n"
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"```text\n{context.command_path} {usage}\n```\n"
    yield f"{_text(command.help or '')}\n"
    if rows := list(_options(command, context)):
        yield "\n".join(["| option | meaning |", "|---|---|", *rows, ""])
    if command.epilog:
        yield f"{_text(command.epilog)}\n"
    if isinstance(command, click.Group):
        for one in command.list_commands(context):
            below = command.get_command(context, one)
            assert below is not None
            yield from _command(below, context, one, min(level + 1, 4))


def _options(command: click.Command, context: click.Context) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is None or isinstance(parameter, click.Argument) or "--help" in parameter.opts:
            continue
        names, told = record
        yield f"| `{_cell(names)}` | {_cell(told.replace('[', '`[').replace(']', ']`'))} |"


def _text(help_text: str) -> str:
    """Return a help text as Markdown; paragraphs that click leaves as they are, too."""
    paragraphs = cleandoc(help_text).split("\n\n")
    return "\n\n".join(_paragraph(one) for one in paragraphs)


def _paragraph(text: str) -> str:
    if text.startswith("\b\n"):
        return f"```text\n{text.removeprefix(chr(8) + chr(10))}\n```"
    return " ".join(text.split())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
