"""The ``spikepatch`` command: its sub-commands, each in a module of ``commands``, and how it ends."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import IO, Any, TextIO, cast

import click

from spikepatch._version import __version__
from spikepatch.commands.architectures import architectures_command
from spikepatch.commands.audit import audit_command
from spikepatch.commands.check import check_command
from spikepatch.commands.codemod import codemod_command
from spikepatch.commands.completion import switch_on
from spikepatch.commands.console import VisibleStream, level_options
from spikepatch.commands.convert import convert_command
from spikepatch.commands.fold import fold_command
from spikepatch.commands.inspect import inspect_command
from spikepatch.commands.nouns import meant_by
from spikepatch.commands.recipes import recipes_command
from spikepatch.commands.report import report_command
from spikepatch.commands.spikes import spikes_command
from spikepatch.commands.train import train_command
from spikepatch.commands.verify import verify_command
from spikepatch.errors import SpikepatchError, check_platform, first_line
from spikepatch.report.terminal import say

#: What the system refuses and nobody here can help -> the remedy.
_FULL = {
    errno.ENOSPC: "make room on the disk",
    errno.EDQUOT: "make room within the quota",
    errno.EROFS: "give a place that can be written to",
    errno.EIO: "check the disk",
    errno.ENAMETOOLONG: "give a shorter path",
    errno.ELOOP: "give a path whose links do not lead back to themselves",
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
    if error.ctx is not None and (meant := meant_by(error.ctx.info_name or "", error.message)):
        remedy = f"did you mean `{meant}`? "
    return SpikepatchError(
        said.rstrip("."),
        where=command,
        why=f"it is used as {usage}",
        remedy=f"{remedy}{command} --help explains every option",
    )


def _open_streams() -> None:
    """What is closed of stdin, stdout and stderr leads nowhere: else the next file that is opened would have its
    number, and what a library prints would be written into that file.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # has the lowest number that is free
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # names of files need not be text, and a terminal may know ASCII only
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def _results_alone() -> Iterator[TextIO]:
    """Where what is written on ``sys.stdout`` goes; what libraries print past it, as Rust's do, would be among the
    JSON, with whatever a source brings.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper) or not _is_descriptor_1(sys.stdout):
        yield sys.stdout
        return
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.close(nowhere)
    line_by_line, encoding = sys.stdout.line_buffering, sys.stdout.encoding
    out = open(kept, "w", encoding=encoding, errors="backslashreplace", buffering=1 if line_by_line else -1)  # noqa: SIM115
    try:
        yield out
    finally:
        with contextlib.suppress(OSError):  # has been told
            out.flush()
        os.dup2(kept, 1)
        with contextlib.suppress(OSError):
            out.close()


def _is_descriptor_1(stream: TextIO) -> bool:
    try:
        return stream.fileno() == 1
    except OSError:  # of a test
        return False


def _forget_output() -> None:
    """What could not be written is not tried again when the interpreter ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with contextlib.suppress(OSError):  # a stream of a test has no number
                os.dup2(nowhere, stream.fileno())


def _say(text: str) -> None:
    """On stderr, if it can be written to."""
    with contextlib.suppress(OSError):
        say(text, err=True)


def _say_full(error: OSError) -> None:
    where = f": {error.filename}" if error.filename else ""
    remedy = _FULL[error.errno or 0]
    _say(f"error: {error.strerror}{where}\n  remedy: {remedy}")
    _forget_output()


def _check_here() -> None:
    """Refuse to begin where relative paths mean nothing, or transformers cannot be imported."""
    if sys.flags.optimize > 1:
        raise SpikepatchError(
            "Python runs without docstrings",
            where="PYTHONOPTIMIZE=2, or -OO",
            why="transformers reads its own, and cannot be imported without them",
            remedy="unset PYTHONOPTIMIZE, or set it to 1",
        )
    try:
        os.getcwd()
    except OSError as error:
        raise SpikepatchError(
            "the current folder cannot be found",
            where="this shell",
            why=f"{error.strerror}: it was deleted or replaced while the shell was in it",
            remedy='change to another folder, or to the new one of this name: cd "$PWD"',
        ) from error


class _Group(click.Group):
    def main(self, *args: Any, **kwargs: Any) -> Any:
        """As click's, with all three streams open, and on stdout results alone, with nothing a terminal would obey."""
        _open_streams()
        with _results_alone() as out, contextlib.redirect_stdout(cast("IO[str]", VisibleStream(out))):
            return super().main(*args, **kwargs)

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Every command takes -v and -q."""
        cmd.params.extend(level_options())
        super().add_command(cmd, name)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """As ``invoke``, for options before the command."""
        try:
            return super().make_context(*args, **kwargs)
        except click.UsageError as error:
            _say(f"error: {_usage(error)}")
            sys.exit(2)
        except BrokenPipeError:  # of what --help and --version print
            _forget_output()
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            _say_full(error)
            sys.exit(2)

    def invoke(self, ctx: click.Context) -> Any:
        """Errors that are the user's to mend: one message, exit code 2. Our own: 3. All are in docs/exit_codes.md."""
        before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        try:
            check_platform()
            _check_here()
            result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk is seen here
            return result
        except SpikepatchError as error:
            _say(f"error: {error}")
            ctx.exit(2)
        except (KeyboardInterrupt, click.Abort):
            _say("interrupted")
            ctx.exit(128 + signal.SIGINT)
        except click.UsageError as error:
            _say(f"error: {_usage(error)}")
            ctx.exit(2)
        except (click.ClickException, click.exceptions.Exit):  # click ends on these
            raise
        except BrokenPipeError:  # who read the output has enough of it, as `| head` has
            _forget_output()
            ctx.exit(128 + signal.SIGPIPE)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _FULL:
                _say_full(error)
                ctx.exit(2)
            if _out_of_memory(error):
                _say(f"error: out of memory: {first_line(error)}\n  remedy: {_SMALLER}")
                ctx.exit(2)
            _say(traceback.format_exc())
            _say("error: this is a bug in spikepatch, not in what you gave it. Please report it with the lines above.")
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


switch_on()  # completion in bash
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
