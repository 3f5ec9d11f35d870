"""`arriero completion bash|zsh|fish`: a completion script made from the verb table and every verb's options."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

from arriero.commands.table import VERBS, load_verb
from arriero.config.option import REQUIRED, OptionGroup, OptionSpec, option, specs_of

HELP = (
    "Print a completion script for a shell. bash: source <(arriero completion bash); "
    "zsh: arriero completion zsh > a folder of $fpath/_arriero; "
    "fish: arriero completion fish > ~/.config/fish/completions/arriero.fish"
)


@dataclass(kw_only=True)
class CompletionOptions(OptionGroup):
    """Completion."""

    shell: str = option(REQUIRED, "bash, zsh or fish", ("bash", "zsh", "fish"), positional=True)


OPTIONS: tuple[type, ...] = (CompletionOptions,)


def _specs() -> dict[str, list[OptionSpec]]:
    return {name: [spec for group in load_verb(name).options for spec in specs_of(group)] for name in VERBS}


def _flags(specs: list[OptionSpec]) -> list[str]:
    names = [f"--{name}" for spec in specs if not spec.positional for name in (spec.name, *spec.aliases)]
    return [*dict.fromkeys(names), "--config", "--debug", "--help"]


def _words(spec: OptionSpec) -> tuple[str, ...]:
    """What may follow an option; nothing where that is free text or a path."""
    if spec.kind is bool:
        return ("yes", "no")
    return spec.choices or ()


def bash_script() -> str:
    """Values are completed by choices where there are some and by file names elsewhere.

    After `launch VERB` the options are those of the verb.
    """
    lines = [
        "# bash completion of arriero: source <(arriero completion bash)",
        "_arriero() {",
        '    local current="${COMP_WORDS[COMP_CWORD]}" previous="${COMP_WORDS[COMP_CWORD-1]}"',
        '    local verb="" word="" index flags="" values=""',
        "    for ((index = 1; index < COMP_CWORD; index++)); do",
        '        word="${COMP_WORDS[index]}"',
        '        case "$word" in',
        f'            {"|".join(VERBS)}) verb="$word"; [[ "$word" == launch ]] || break ;;',
        "        esac",
        "    done",
        '    if [[ -z "$verb" ]]; then',
        f'        COMPREPLY=($(compgen -W "{" ".join(VERBS)} --help --version --debug" -- "$current"))',
        "        return",
        "    fi",
        '    case "$verb" in',
    ]
    for name, specs in _specs().items():
        lines.append(f'        {name}) flags="{" ".join(_flags(specs))}"')
        by_words: dict[tuple[str, ...], list[str]] = {}
        for spec in specs:
            if _words(spec) and not spec.positional:
                by_words.setdefault(_words(spec), []).extend(f"--{flag}" for flag in (spec.name, *spec.aliases))
        if by_words:
            lines.append('            case "$previous" in')
            lines += [
                f'                {"|".join(flags)}) values="{" ".join(words)}" ;;' for words, flags in by_words.items()
            ]
            lines.append("            esac")
        positional = [word for spec in specs if spec.positional for word in _words(spec)]
        if name == "launch":
            positional = [verb for verb in VERBS if verb != "launch"]
        if positional:
            lines.append(f'            [[ "$current" == -* ]] || values="{" ".join(positional)}"')
        lines.append("            ;;")
    lines += [
        "    esac",
        '    if [[ -n "$values" && "$current" != -* ]]; then',
        '        COMPREPLY=($(compgen -W "$values" -- "$current"))',
        '    elif [[ "$current" == -* ]]; then',
        '        COMPREPLY=($(compgen -W "$flags" -- "$current"))',
        "    else",
        '        COMPREPLY=($(compgen -f -- "$current"))',
        "    fi",
        "}",
        "complete -o filenames -F _arriero arriero",
    ]
    return "\n".join(lines) + "\n"


def _zsh_text(text: str) -> str:
    """A description inside an `_arguments` specification."""
    return text.replace("\\", "\\\\").replace("[", "(").replace("]", ")").replace(":", "\\:")


def zsh_script() -> str:
    """A `#compdef` function for a folder of `$fpath`."""
    lines = ["#compdef arriero", "_arriero() {", "    local -a verbs; verbs=("]
    lines += ["        " + shlex.quote(f"{name}:{help_line}") for name, (_, help_line) in VERBS.items()]
    lines += [
        "    )",
        "    if (( CURRENT == 2 )); then _describe command verbs; return; fi",
        "    local verb=$words[2]; shift words; (( CURRENT-- ))",
        "    case $verb in",
    ]
    for name, specs in _specs().items():
        lines.append(f"        {name}) _arguments \\")
        for spec in specs:
            words = _words(spec)
            action = f"({' '.join(words)})" if words else "_files"
            if spec.positional:
                action = f"({' '.join(VERBS)})" if spec.remainder else action
                entries = [f"{'*' if spec.is_list else ''}:{spec.name}:{action}"]
            else:
                colon = "::" if spec.kind is bool else ":"
                entries = [
                    f"--{flag}[{_zsh_text(spec.help)}]{colon}{spec.name}:{action}"
                    for flag in (spec.name, *spec.aliases)
                ]
            lines += [f"            {shlex.quote(entry)} \\" for entry in entries]
        lines.append(
            "            '--config[a YAML or JSON file of options]:config:_files' "
            "'--debug[show tracebacks]' '--help[the options]' ;;"
        )
    lines += ["    esac", "}", '_arriero "$@"']
    return "\n".join(lines) + "\n"


def fish_script() -> str:
    """`complete` lines for fish."""
    lines = ["# fish completion of arriero"]
    for name, (_, help_line) in VERBS.items():
        lines.append(f"complete -c arriero -n __fish_use_subcommand -f -a {name} -d {_fish_quote(help_line)}")
    for name, specs in _specs().items():
        condition = f"'__fish_seen_subcommand_from {name}'"
        for spec in specs:
            words = _words(spec)
            values = f" -f -a '{' '.join(words)}'" if words else ""
            if spec.positional:
                if values:
                    lines.append(f"complete -c arriero -n {condition}{values}")
                continue
            needs = "" if spec.kind is bool else " -r"
            for flag in (spec.name, *spec.aliases):
                lines.append(f"complete -c arriero -n {condition} -l {flag}{needs}{values} -d {_fish_quote(spec.help)}")
        lines.append(f"complete -c arriero -n {condition} -l config -r -d 'a YAML or JSON file of options'")
    return "\n".join(lines) + "\n"


def _fish_quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


_SCRIPTS = {"bash": bash_script, "zsh": zsh_script, "fish": fish_script}


def run(completion: CompletionOptions) -> int:
    """Print the script."""
    sys.stdout.write(_SCRIPTS[completion.shell]())
    return 0
