"""The ``spikepatch`` command: its sub-commands, each in a module of ``commands``, and how it ends."""

from __future__ import annotations

import errno
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any

import click

from spikepatch._version import __version__
from spikepatch.commands.architectures import architectures_command
from spikepatch.commands.audit import audit_command
from spikepatch.commands.check import check_command
from spikepatch.commands.codemod import codemod_command
from spikepatch.commands.console import level_options
from spikepatch.commands.convert import convert_command
from spikepatch.commands.fold import fold_command
from spikepatch.commands.inspect import inspect_command
from spikepatch.commands.recipes import recipes_command
from spikepatch.commands.report import report_command
from spikepatch.commands.spikes import spikes_command
from spikepatch.commands.train import train_command
from spikepatch.commands.verify import verify_command
from spikepatch.errors import SpikepatchError, check_platform, first_line

#: What the system refuses and nobody here can help -> the remedy.
_FULL = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EROFS: "give a place that can be written to",
    errno.EIO: "check the disk",
    errno.EMFILE: "allow more open files: ulimit -n",
    errno.ENFILE: "allow more open files on this machine",
}

_SMALLER = "give less at a time (--batch, --micro-batch, --tokens, --seq-len), or a machine with more memory"


def _out_of_memory(error: Exception) -> bool:
    if "torch" not in sys.modules:
        return isinstance(error, MemoryError)
    from spikepatch.source.private import is_out_of_memory

    return is_out_of_memory(error)


def _usage(error: click.UsageError) -> SpikepatchError:
    """What the option parser says, in the form of every other error."""
    command = error.ctx.command_path if error.ctx is not None else "spikepatch"
    usage = error.ctx.get_usage().removeprefix("Usage: ") if error.ctx is not None else command
    near: Sequence[str] = getattr(error, "possibilities", None) or ()
    said = error.message if near else error.format_message()
    remedy = f"did you mean {' or '.join(sorted(near)[:3])}? " if near else ""
    return SpikepatchError(
        said.rstrip("."),
        where=command,
        why=f"it is used as {usage}",
        remedy=f"{remedy}{command} --help explains every option",
    )


def _forget_stdout() -> None:
    """What could not be written is not tried again when the interpreter ends."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _say_full(error: OSError) -> None:
    where = f": {error.filename}" if error.filename else ""
    remedy = _FULL[error.errno or 0]
    click.echo(f"error: {error.strerror}{where}\n  remedy: {remedy}", err=True)
    _forget_stdout()


class _Group(click.Group):
    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Every command takes -v and -q."""
        cmd.params.extend(level_options())
        super().add_command(cmd, name)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As ``invoke``, for options before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            click.echo(f"error: {_usage(error)}", err=True)
            sys.exit(2)
        except OSError as error:  # of what --help and --version print
            if error.errno not in _FULL:
                raise
            _say_full(error)
            sys.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        """Errors that are the user's to mend: one message, exit code 2. Our own: 3. All are in docs/exit_codes.md."""
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            check_platform()
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()  # a full disk is seen here
            return result
        except SpikepatchError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)
        except (KeyboardInterrupt, click.Abort):
            click.echo("interrupted", err=True)
            ctx.exit(128 + signal.SIGINT)
        except click.UsageError as error:
            click.echo(f"error: {_usage(error)}", err=True)
            ctx.exit(2)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):  # click ends on these
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                _say_full(error)
                ctx.exit(2)
            if _out_of_memory(error):
                click.echo(f"error: out of memory: {first_line(error)}\n  remedy: {_SMALLER}", err=True)
                ctx.exit(2)
            click.echo(traceback.format_exc(), err=True)
            click.echo(
                "error: this is a bug in spikepatch, not in what you gave it. Please report it with the lines above.",
                err=True,
            )
            ctx.exit(3)
        finally:
            signal.signal(signal.SIGTERM, before)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="spikepatch")
@click.option("--local_rank", "--local-rank", hidden=True, expose_value=False)  # of launchers; the environment has it
def main() -> None:
    """Put the stable pre-training initialisation of "Spike No More" into any HuggingFace model or checkpoint.

    Loss spikes are kept away by two conditions: small sub-layers (small initial weights, residual projections scaled
    by 1/sqrt(S)) and a large shortcut (embeddings that enter the residual stream with a std near 1). spikepatch finds
    the residual stream by dataflow, proves that it found all of it, and writes a model that meets both.

    \b
        spikepatch audit ./my-init            the parameters that were initialised wrongly, by name
        spikepatch check arch:gpt2            whether it is at risk, before it is trained
        spikepatch convert arch:gpt2 out/     a fresh, patched GPT-2
        spikepatch train gpt2 out/ ...        trained on the same batches: which stays free of spikes
        spikepatch report runs/x              what became of it, as a page
        spikepatch spikes log.txt             the spikes in anybody's training log
        spikepatch fold trained/ plain/       after training: the plain architecture again
        spikepatch inspect gpt2               what its residual stream is made of
        spikepatch recipes                    what can be put into it

    Completion of commands, options and names of recipes is switched on by one line:

    \b
        eval "$(_SPIKEPATCH_COMPLETE=bash_source spikepatch)"    in ~/.bashrc
        eval "$(_SPIKEPATCH_COMPLETE=zsh_source spikepatch)"     in ~/.zshrc
        _SPIKEPATCH_COMPLETE=fish_source spikepatch | source     in ~/.config/fish/config.fish
    """
    # Before the first import of transformers, which reads them once.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


main.add_command(convert_command)
main.add_command(fold_command)
main.add_command(inspect_command)
main.add_command(verify_command)
main.add_command(audit_command)
main.add_command(check_command)
main.add_command(train_command)
main.add_command(report_command)
main.add_command(spikes_command)
main.add_command(codemod_command)
main.add_command(recipes_command)
main.add_command(architectures_command)
