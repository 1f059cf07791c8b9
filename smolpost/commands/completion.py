"""smolpost completion: a script that teaches a shell the verbs, the options and the names of recipes and stages."""

import argparse
import re
from functools import cache
from pathlib import Path

SHELLS = ("bash", "zsh", "fish")
WORDS = "_smolpost_words"  # the shells' function for key=value words
KEYS = ("run_dir=", "seed=")  # beside the groups of recipe files and `stage`


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "shell",
        choices=SHELLS,
        help="put what is printed where the shell looks: ~/.local/share/bash-completion/completions/smolpost, "
        "_smolpost in a folder of zsh's fpath, or ~/.config/fish/completions/smolpost.fish",
    )


def command(options: argparse.Namespace) -> int:
    import shtab

    from smolpost.cli import VERBS, parsers

    parser, verbs = parsers(list(VERBS))
    groups, stages = _names()
    functions = {"bash": _bash, "zsh": _zsh, "fish": lambda *_: ""}
    for verb in verbs.values():
        for action in verb._actions:
            if action.dest == "words":
                action.complete = {"bash": WORDS, "zsh": WORDS, "fish": _fish(groups, stages)}
            elif action.dest == "recipes":
                action.complete = shtab.DIRECTORY
            elif action.type is Path:
                action.complete = shtab.FILE
    script = shtab.complete(parser, options.shell, preamble=functions[options.shell](groups, stages))
    # What shtab writes for zsh completes the first of the words only.
    script = re.sub(rf'"\(\*\)::(.*:{WORDS})"', r'"*:\1"', script)
    print(script + (_BASH_END if options.shell == "bash" else ""))
    return 0


@cache
def _names() -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Group of recipe files -> their names in the library, and pipeline -> names of its stages."""
    from smolpost import recipe
    from smolpost.errors import UserError
    from smolpost.recipe.places import GROUPS, Places

    places = Places((), None)
    groups = {group: places.options(group) for group in ("pipeline", *GROUPS) if group != "teacher"}
    stages = {}
    for pipeline in groups["pipeline"]:
        try:
            stages[pipeline] = list(recipe.load([f"pipeline={pipeline}"]).recipe.stages)
        except UserError:  # one that needs more words
            stages[pipeline] = []
    return groups, stages


def _all_stages(stages: dict[str, list[str]]) -> str:
    return " ".join(dict.fromkeys(name for names in stages.values() for name in names))


# Where bash breaks words at "=", as it does by default, it asks for the part behind it.
_BASH = """{function}() {{
  local line="${{COMP_LINE:0:COMP_POINT}}" names file front=""
  local word="${{line##*[[:space:]]}}"
  local value="${{word#*=}}"
  [[ "$COMP_WORDBREAKS" == *=* ]] || front="${{word%%=*}}="
  case "$word" in
    pipeline=.*|pipeline=/*) compgen -P "$front" -f -X '!*.yaml' -- "$value"; return ;;
    pipeline=*)
      names="{pipelines}"
      for file in *.yaml pipeline/*.yaml; do
        [[ -f "$file" ]] && file="${{file##*/}}" && names+=" ${{file%.yaml}}"
      done ;;
{groups}
    stage=*)
      case " $line" in
{stages}
        *) names="{every}" ;;
      esac ;;
    *=*) compgen -P "$front" -f -- "$value"; return ;;
    *) compgen -W "{keys}" -- "$word"; return ;;
  esac
  compgen -P "$front" -W "$names" -- "$value"
}}"""
_BASH_END = """

_smolpost() {
  _shtab_smolpost
  [[ ${#COMPREPLY[@]} == 1 && "${COMPREPLY[0]}" == *= ]] && compopt -o nospace
  return 0
}
complete -o bashdefault -F _smolpost smolpost"""
_ZSH = """{function}() {{
  local -a names
  case "$PREFIX" in
{groups}
    stage=*)
      case " ${{words[*]}} " in
{stages}
        *) names=({every}) ;;
      esac ;;
    *=*) compset -P '*='; _files; return ;;
    *) compadd -S '' -- {keys}; return ;;
  esac
  compset -P '*='
  compadd -a names
}}"""


def _bash(groups: dict[str, list[str]], stages: dict[str, list[str]]) -> str:
    return _filled(_BASH, groups, stages, '"{}"')


def _zsh(groups: dict[str, list[str]], stages: dict[str, list[str]]) -> str:
    return _filled(_ZSH, groups, stages, "({})")


def _filled(text: str, groups: dict[str, list[str]], stages: dict[str, list[str]], listed: str) -> str:
    cases = [
        f"    {group}=*) names={listed.format(' '.join(names))} ;;"
        for group, names in groups.items()
        if (group, text) != ("pipeline", _BASH)  # which also looks for files of the user
    ]
    own = [
        f"        *' pipeline={name} '*) names={listed.format(' '.join(found))} ;;" for name, found in stages.items()
    ]
    keys = " ".join([*(f"{group}=" for group in groups), "stage=", *KEYS])
    return text.format(
        function=WORDS,
        pipelines=" ".join(groups["pipeline"]),
        groups="\n".join(cases),
        stages="\n".join(own),
        every=_all_stages(stages),
        keys=keys,
    )


def _fish(groups: dict[str, list[str]], stages: dict[str, list[str]]) -> str:
    words = [f"{group}={name}" for group, names in groups.items() for name in names]
    words += [f"stage={name}" for name in _all_stages(stages).split()]
    return " ".join([*words, *KEYS])
