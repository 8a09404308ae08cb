"""pcs completion: scripts that complete commands and flags, made from the commands' own tables."""

from __future__ import annotations

import argparse

from ...errors import UsageError
from ..exit_codes import DONE
from ..options import COMMON, Command, Option, one_of
from . import COMMANDS

SHELLS = ("bash", "zsh", "fish")

BASH = """_pcs() {{
  local word="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" flags=""
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "{commands} --help --version" -- "$word")); return; fi
  case "${{COMP_WORDS[1]}} $before" in
{values}
  esac
  case "${{COMP_WORDS[1]}}" in
{flags}
  esac
  if [[ "$word" == -* ]]; then COMPREPLY=($(compgen -W "$flags" -- "$word"))
  else COMPREPLY=($(compgen -f -- "$word")); fi
}}
complete -o filenames -F _pcs pcs
"""

ZSH = """#compdef pcs
_pcs() {{
  if (( CURRENT == 2 )); then local -a commands; commands=(
{commands}
  ); _describe command commands; return; fi
  case $words[2] in
{flags}
  esac
}}
if [ "$funcstack[1]" = "_pcs" ]; then _pcs "$@"; else compdef _pcs pcs; fi
"""


def tables() -> dict[str, tuple[str, Command]]:
    """Name -> what the command is about, and its table of flags."""
    from . import command

    return {name: (about, command(name)) for name, about in COMMANDS.items()}


def flags(command: Command) -> list[Option]:
    """Every flag that can be completed, --help among them."""
    helping = Option("--help", "show the flags with examples", None)
    return [o for o in (*command.options, *COMMON, helping) if not o.positional]


def bash() -> str:
    """The script for bash."""
    all_flags, values = [], []
    for name, (_, command) in tables().items():
        all_flags.append(f'    {name}) flags="{" ".join(o.name for o in flags(command))}" ;;')
        for option in command.options:
            if option.choices:
                reply = f'COMPREPLY=($(compgen -W "{" ".join(option.choices)}" -- "$word"))'
                values.append(f'    "{name} {name if option.positional else option.name}") {reply}; return ;;')
    return BASH.format(commands=" ".join(tables()), flags="\n".join(all_flags), values="\n".join(values))


def _zsh_quoted(text: str) -> str:
    return text.replace("'", "'\\''").replace("[", "(").replace("]", ")").replace(":", ",")


def zsh() -> str:
    """The script for zsh."""
    commands = [f"    '{name}:{_zsh_quoted(about)}'" for name, (about, _) in tables().items()]
    cases = []
    for name, (_, command) in tables().items():
        parts = []
        for option in flags(command):
            what = f"({' '.join(option.choices)})" if option.choices else "_files"
            value = "" if option.kind is None else f":{option.key}:{what}"
            parts.append(f"'{option.name}[{_zsh_quoted(option.help)}]{value}'")
        words = next((o for o in command.options if o.positional), None)
        what = f"({' '.join(words.choices)})" if words and words.choices else "_files"
        cases.append(f"    {name}) shift words; (( CURRENT-- )); _arguments -S {' '.join(parts)} '*:word:{what}' ;;")
    return ZSH.format(commands="\n".join(commands), flags="\n".join(cases))


def fish() -> str:
    """The script for fish."""
    lines = ["complete -c pcs -n __fish_use_subcommand -f"]
    for name, (about, command) in tables().items():
        lines.append(f"complete -c pcs -n __fish_use_subcommand -f -a {name} -d {_fish_quoted(about)}")
        for option in command.options + COMMON:
            names = f" -x -a '{' '.join(option.choices)}'" if option.choices else ""
            if option.positional:
                lines += [f"complete -c pcs -n '__fish_seen_subcommand_from {name}'{names}"] if names else []
                continue
            value = "" if option.kind is None else (names or " -r")
            flag = f"-l {option.name.lstrip('-')}{value} -d {_fish_quoted(option.help)}"
            lines.append(f"complete -c pcs -n '__fish_seen_subcommand_from {name}' {flag}")
    return "\n".join(lines) + "\n"


def _fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def run(options: argparse.Namespace) -> int:
    """Print the shell's script; the exit code."""
    if len(options.shell or []) != 1:
        raise UsageError(f"pcs completion needs one shell: {', '.join(SHELLS)}")
    print({"bash": bash, "zsh": zsh, "fish": fish}[options.shell[0]](), end="")
    return DONE


COMMAND = Command(
    name="completion",
    about=COMMANDS["completion"],
    options=(Option("shell", "bash, zsh or fish", one_of("shell", SHELLS), metavar="SHELL", group="words"),),
    examples=(
        ("pcs completion bash", 'bash: put  eval "$(pcs completion bash)"  into ~/.bashrc'),
        ("pcs completion zsh", "zsh: save it as _pcs in a folder of $fpath"),
        ("pcs completion fish", "fish: save it as ~/.config/fish/completions/pcs.fish"),
    ),
    run=run,
)
