"""The `pcs` command: finds the command, reads its flags, runs it, and says in one sentence what went wrong."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

from ..errors import DoesNotFit, UnsupportedModel, UsageError, out_of_memory
from .commands import COMMANDS, command
from .config import effective
from .exit_codes import DOES_NOT_FIT, DONE, FAILED, INTERRUPTED, WRONG_USAGE
from .options import help_text, meant, parse


def overview() -> str:
    """What `pcs --help` prints."""
    lines = ["pcs: teach Stable Diffusion a subject from a few photos, fast and in little memory", "", "Commands"]
    lines += [f"  {name:<12}{about}" for name, about in COMMANDS.items()]
    lines += [
        "",
        "Examples",
        "  pcs demo                                          several methods on the example photos, and a report",
        "  pcs train examples/photos --class mug             learn a mug on the embedded model",
        '  pcs sample "a photo of {} on the beach" --concept out/mug',
        "  pcs train my-photos --class dog --model path/to/stable-diffusion-v1-5 --budget 6GB",
        "",
        "pcs COMMAND --help shows a command's flags with examples; pcs --version the version.",
        "Exit codes: 0 done, 1 failed, 2 wrong usage, 3 does not fit the budget, 130 interrupted.",
    ]
    return "\n".join(lines) + "\n"


def run(words: Sequence[str]) -> int:
    """Run one command line; errors come out as exceptions."""
    from ..version import own_version

    first = words[0] if words else "--help"
    if first in ("-h", "--help", "help"):
        print(help_text(command(words[1])) if first == "help" and len(words) > 1 else overview(), end="")
        return DONE
    if first in ("-V", "--version", "version"):
        print(f"pcs {own_version()}")
        return DONE
    if first not in COMMANDS:
        what = "flag" if first.startswith("-") else "command"
        names = ["--help", "--version", *COMMANDS]
        raise UsageError(f"unknown {what} {first}{meant(first, names) or '; pcs --help shows all commands'}")
    chosen = command(first)
    if any(word in ("-h", "--help") for word in words[1:]):
        print(help_text(chosen), end="")
        return DONE
    options = effective(chosen, parse(chosen, words[1:]))
    for note in options.notes:
        print(f"pcs: {note}", file=sys.stderr)
    return chosen.run(options)


def sentence(error: BaseException) -> str:
    """An error in one line, with the fix where we know one."""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{error.filename} does not exist"
    if isinstance(error, PermissionError) and error.filename:
        return f"{error.filename} cannot be read or written: permission denied"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        name = error.filename or "a file"
        return f"{name} could not be written: the disk is full; free some space or give another --out"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'the system'}: {error.strerror}"
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("pcs_trainer."):
        return f"{error.name} is not installed. Fix: pip install 'pcs_kernels[trainer]'"
    if isinstance(error, (ValueError, ImportError, OSError)) or type(error).__module__.startswith("pcs_"):
        return text
    return f"{type(error).__name__}: {text[:300]} (pcs ... --debug shows where)"


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends the command with."""
    if isinstance(error, (UsageError, UnsupportedModel)):
        return WRONG_USAGE
    return DOES_NOT_FIT if isinstance(error, DoesNotFit) or out_of_memory(error) else FAILED


def main(argv: Sequence[str] | None = None) -> int:
    """The `pcs` command: an error is one sentence on stderr, and the exit code says its kind."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    if words and words[0] == "--debug":
        words.append(words.pop(0))
    try:
        return run(words)
    except KeyboardInterrupt:
        print("\npcs: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return DONE
    except Exception as error:
        if debug:
            raise
        print(f"pcs: {sentence(error)}", file=sys.stderr)
        return exit_code(error)


if __name__ == "__main__":
    sys.exit(main())
