"""The surface of the command as text: every command with its arguments, options, types and defaults.

``python -m tests.cli_surface > tests/cli_surface.txt`` after a change that is meant.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from spikepatch.cli import main


def surface() -> str:
    """A block for the program itself and for each command, as it is called."""
    blocks = [_block("spikepatch", main), *(_block(name, main.commands[name]) for name in sorted(main.commands))]
    return "\n\n".join("\n".join(block) for block in blocks) + "\n"


def _block(name: str, command: click.Command) -> Iterator[str]:
    arguments = [p for p in command.params if isinstance(p, click.Argument)]
    yield " ".join([name, *(a.human_readable_name if a.required else f"[{a.human_readable_name}]" for a in arguments)])
    for option in command.params:
        if isinstance(option, click.Option):
            yield f"    {_option(option)}"


def _option(option: click.Option) -> str:
    words = ["/".join([*option.opts, *option.secondary_opts])]
    if not option.is_flag:
        words.append(_type(option.type))
    if option.multiple:
        words.append("(repeatable)")
    if option.required:
        words.append("(required)")
    if not option.is_flag and (default := option.to_info_dict()["default"]) not in (None, ""):
        words.append(f"= {default}")
    return " ".join(words)


def _type(kind: click.ParamType[Any]) -> str:
    match kind:
        case click.Choice():
            return "|".join(kind.choices)
        case click.IntRange() | click.FloatRange():
            least = "" if kind.min is None else f">{'' if kind.min_open else '='}{kind.min:g}"
            most = "" if kind.max is None else f"<{'' if kind.max_open else '='}{kind.max:g}"
            return kind.name.removesuffix(" range") + least + most
        case click.Tuple():
            return " ".join(_type(part) for part in kind.types)
    return kind.name


if __name__ == "__main__":
    click.echo(surface(), nl=False)
