# SPDX-License-Identifier: MIT
"""The `entrollm` command: finds the subcommand, and turns errors into one line and an exit code."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib import import_module

import click

from entrollm_gguf import __version__
from entrollm_gguf.console import printable
from entrollm_gguf.errors import EntroLLMError

# name -> (module:attribute, one line for --help). The line stands here so that `entrollm --help`
# imports nothing heavy.
_COMMANDS = {
    "runtime": ("entrollm_gguf.runtime.cli:runtime", "Build the patched llama.cpp, and show what is installed."),
    "convert": ("entrollm_gguf.convert.cli:convert", "Convert a Hugging Face model to an entropy-coded GGUF."),
    "decode": ("entrollm_gguf.inspect.cli:decode", "Turn an entropy-coded GGUF into a plain one for stock llama.cpp."),
    "inspect": ("entrollm_gguf.inspect.cli:inspect", "Show the tensors of a GGUF: type, size, bits per weight, entropy."),
    "verify": ("entrollm_gguf.inspect.cli:verify", "Check that a GGUF is whole and intact."),
    "chat": ("entrollm_gguf.eval.cli:chat", "Chat with a GGUF."),
    "perplexity": ("entrollm_gguf.eval.cli:perplexity", "Measure perplexity and KL divergence on a text."),
    "demo": ("entrollm_gguf.eval.cli:demo", "Convert a real model, compare it with stock types, and ask it a question."),
    "report": ("entrollm_gguf.eval.cli:report", "Compare GGUF files in an HTML report."),
}


class _LazyGroup(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, attribute = _COMMANDS[cmd_name][0].split(":")
        return getattr(import_module(module), attribute)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, line) for name, (_, line) in _COMMANDS.items()])


@click.group(
    cls=_LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="\b\nFirst steps:\n  entrollm runtime build\n  entrollm convert ./SmolLM2-135M-Instruct smollm2.gguf\n  entrollm chat smollm2.gguf\n",
)
@click.version_option(__version__, prog_name="entrollm")
@click.option("--debug", is_flag=True, help="Show tracebacks of errors.")
def cli(debug: bool) -> None:
    """Entropy-coded GGUF models for llama.cpp: convert, inspect, measure, chat."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns the exit code: 0, 1 for errors, 2 for wrong usage, 130 after
    Ctrl-C, 143 and 129 after SIGTERM and SIGHUP."""
    argv = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names that the terminal's encoding does not have
    with _terminated_like_ctrl_c() as received:
        return _run(argv, received)


def _run(argv: list[str], received: list[int]) -> int:
    try:
        result = cli.main(argv, prog_name="entrollm", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        number = received[0] if received else signal.SIGINT
        _complain(f"ended by {signal.Signals(number).name}" if received else "interrupted")
        return 128 + number
    except EntroLLMError as error:
        if "--debug" in argv:
            raise
        _complain(str(error))
        return error.exit_code
    except MemoryError:
        _complain("out of memory; close other programs, or convert on a larger machine")
        return 1
    except BrokenPipeError:  # `entrollm inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if "--debug" in argv:
            raise
        name = f"{error.filename}: " if error.filename else ""
        hint = "; free some space" if error.errno == errno.ENOSPC else ""
        _complain(f"{name}{error.strerror or error}{hint}")
        return 1
    except Exception as error:  # the last resort: a fault of ours
        if "--debug" in argv:
            raise
        _complain(
            f"unexpected {type(error).__name__}: {error}; this is a fault of entrollm, please report it with what `entrollm --debug ...` shows"
        )
        return 1


@contextlib.contextmanager
def _terminated_like_ctrl_c() -> Iterator[list[int]]:
    """SIGTERM (containers, systemd) and SIGHUP (a closed terminal) raise KeyboardInterrupt, too, so
    that nothing half-written stays.

    Yields:
        numbers of the signals that came.
    """
    received: list[int] = []

    def interrupt(number: int, _: object) -> None:
        received.append(number)
        raise KeyboardInterrupt

    numbers = [signal.Signals[name] for name in ("SIGTERM", "SIGHUP") if name in signal.Signals.__members__]
    # what is ignored stays ignored (nohup), and what an embedding program handles is its own
    numbers = [number for number in numbers if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    for number in numbers:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _complain(message: str) -> None:
    click.echo(f"entrollm: error: {printable(' '.join(message.split()))}", err=True)


if __name__ == "__main__":
    sys.exit(main())
