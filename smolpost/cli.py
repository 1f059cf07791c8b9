"""The command line: smolpost VERB [key=value ...]. Each verb is a file of `smolpost.commands`."""

import argparse
import contextlib
import importlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator

from smolpost import __version__, disks, signals, stage_log, third_party
from smolpost.errors import UserError

third_party.silence()  # here, as all programs import this file before the libraries that it silences

VERBS = {  # verb -> (its file in `smolpost.commands`, what it does)
    "new": ("new", "look at a checkpoint and rows of yours, and write the pipeline that trains it on them"),
    "plan": ("plan", "print the stages, their settings and the exact commands; run nothing"),
    "run": ("run", "run the pipeline, or one stage and what it needs; skips finished stages, continues stopped ones"),
    "status": ("status", "list runs, their stages, where each is, and the command that goes on"),
    "logs": ("logs", "print what a stage's commands have printed; --follow goes on while it runs"),
    "make": ("make", "make one stage whose inputs are finished, in this process"),
    "generate": (
        "generate",
        "ask the teachers of a stage, in one part of the prompts with task=K; make then finishes the stage",
    ),
    "prepare": ("prepare", "tokenize, mask and pack the rows of a training stage"),
    "inspect": (
        "inspect",
        "show prepared rows token by token: which tokens train, and why; or synthetic data with its verdicts",
    ),
    "bench": (
        "bench",
        "measure the speed and memory of a training stage by a few steps on random weights; writes nothing",
    ),
    "doctor": ("doctor", "check the model, template and data of a training stage on a sample of its rows"),
    "eval": (
        "evaluate",
        "evaluate a stage's model; stage=checkpoint is the model that the pipeline starts from",
    ),
    "chat": ("chat", "talk to a stage, a checkpoint folder or a server, or to two of them side by side"),
    "compare": ("compare", "compare runs of one pipeline with several seeds: means, ranges, a plot of their sweeps"),
    "sample": ("sample", "ask several models the same prompts, in both modes, and write one page of their replies"),
    "merge": ("merge", "merge checkpoint folders by a weighted mean, a mergekit method or a mergekit YAML file"),
    "add-tokens": ("add_tokens", "write a copy of a checkpoint that has the control tokens of a chat template"),
    "import": (
        "import_settings",
        "write a pipeline from a YAML file of TRL, alignment-handbook or Axolotl, and list what differs",
    ),
    "export": ("export", "convert a checkpoint for another runtime and compare the scores of both"),
    "serve": (
        "serve",
        "print the command that serves a teacher, for vLLM, SGLang, transformers or llama.cpp; --run runs it",
    ),
    "card": ("card", "print the card of a finished stage: what it is, how it was made, its scores"),
    "push": (
        "push",
        "copy a finished model or synthetic rows, with a card, to the Hub or another file system; --yes writes",
    ),
    "completion": ("completion", "print a script that completes verbs, options and names in bash, zsh or fish"),
    "adopt": ("adopt", "check a checkpoint folder from elsewhere and write its manifest"),
}
EPILOG = """key=value words are Hydra overrides. pipeline=NAME is NAME.yaml or pipeline/NAME.yaml in a --recipes FOLDER
or in the current folder, else a pipeline of the library; pipeline=./FILE.yaml is that file. model=, data= and
accelerate=NAME choose files in a --recipes FOLDER or in the library. stage=NAME chooses a stage. Every other field is
set by its full key, e.g. stages.sft.learning_rate=1e-4."""
HYDRA_FLAGS = {  # of Hydra's own command line -> what to use here
    ("-m", "--multirun"): "a pipeline is one run; loop over the values in the shell, with a run_dir=FOLDER for each",
    ("-i", "--info"): "smolpost plan shows stages and commands, smolpost plan --cfg job the recipe",
    ("-cp", "--config-path", "-cd"): "--recipes FOLDER names a folder of recipes",
    ("-cn", "--config-name"): "pipeline=NAME or pipeline=./FILE.yaml chooses the recipe",
    ("-p", "--package"): "smolpost plan --cfg job prints the recipe from its root",
    ("-r", "--run", "--hydra-help", "-sc", "--shell-completion", "--experimental-rerun"): "leave it out",
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """The one place where a user's mistake, a disk that takes no more and a signal become a line and an exit code."""
    with stage_log.command(), _as_lines():
        yield


@contextlib.contextmanager
def _as_lines() -> Iterator[None]:
    try:
        with signals.handled_by(signals.stop):
            yield
    except UserError as error:
        print(f"smolpost: {error}", file=sys.stderr)
        sys.exit(2)
    except signals.Stopped as stop:
        code = signals.exit_code(stop.signum)
        if signals.UNDER_RUN not in os.environ:
            print(signals.stopped_line(code, stop.where), file=sys.stderr)
        sys.exit(code)
    except Exception as error:
        line = _missing_package(error) if isinstance(error, ImportError) else disks.explained(error)
        if line is None:
            raise
        print(f"smolpost: {line}", file=sys.stderr)
        sys.exit(2)


def _missing_package(error: ImportError) -> str | None:
    """What is not there, and what installs it: the extra that brings it, or its own name; None for other faults."""
    if not isinstance(error, ModuleNotFoundError):  # a library's own check
        return " ".join(str(error).split()) if "install" in str(error) else None
    package = (error.name or "smolpost").partition(".")[0].replace("_", "-")
    if package == "smolpost":
        return None
    for requirement in importlib.metadata.requires("smolpost"):
        found = re.match(rf"{re.escape(package)}\b(?!-).*extra == \"([\w-]+)\"", requirement)
        if found:
            return f"{error}; pip install 'smolpost[{found[1]}]'"
    return f"{error}; pip install {package}"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    with one_line_errors():
        chosen = argv[0] if argv and argv[0] in VERBS else None
        parser, verbs = parsers([chosen] if chosen else [])
        if chosen is None:
            parser.parse_args(argv)  # --help, --version, or a refusal
            parser.error("the verb comes first")
        takes_words = any(action.dest == "words" for action in verbs[chosen]._actions)
        if takes_words:
            _check_flags(argv)
        # Words and options in any order, which a parser of verbs does not give its verbs.
        options = verbs[chosen].parse_intermixed_args(argv[1:])
        sys.exit(_module(chosen).command(options))


def parsers(complete: list[str]) -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the command line, and those of its verbs.

    Args:
        complete: The verbs whose arguments are wanted; the files of the others are not imported.
    """
    parser = argparse.ArgumentParser(prog="smolpost", description="smolpost VERB [key=value ...]", epilog=EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, (_, text) in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text, epilog=EPILOG)
        sub.set_defaults(verb=verb)
        if verb in complete:
            _module(verb).add_arguments(sub)
    return parser, verbs.choices


def _module(verb: str):
    return importlib.import_module(f"smolpost.commands.{VERBS[verb][0]}")


def _check_flags(argv: list[str]) -> None:
    for flag in (word.partition("=")[0] for word in argv[1:]):
        remedy = next((remedy for flags, remedy in HYDRA_FLAGS.items() if flag in flags), None)
        if flag in ("--cfg", "-c", "--resolve") and argv[0] != "plan":
            remedy = "smolpost plan --cfg job prints the recipe"
        if remedy:
            raise UserError(f"{flag} is a flag of Hydra's own command line; {remedy}")


def job(kind: str) -> None:
    """Run a script of data_gen/ or merge/: make the stage that its command line names, or preview=N of it.

    Args:
        kind: The stage kind that the script makes.
    """
    from smolpost.commands.words import one_stage, previewed
    from smolpost.pipeline import steps

    with one_line_errors():
        words, rows = previewed(sys.argv[1:])
        _, lineage, stage = one_stage(words)
        if stage.config.kind != kind:
            raise UserError(f"stage={stage.name} is of kind {stage.config.kind}; this job makes {kind} stages")
        if rows is not None:
            steps.preview(lineage, stage, rows)
        else:
            steps.make(lineage, stage)


if __name__ == "__main__":
    main()
