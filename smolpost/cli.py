"""The command line: smolpost <verb> [key=value ...]."""

import argparse
import contextlib
import importlib.metadata
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from smolpost import __version__, disks, screen, signals, third_party
from smolpost.errors import UserError
from smolpost.importing.command import add_arguments as add_import_arguments
from smolpost.merging.command import add_arguments as add_merge_arguments
from smolpost.synthesis.serve import OWN_SERVERS, notes, program, serve_command
from smolpost.synthesis.settings import Teacher

third_party.silence()  # here, as all programs import this file before the libraries that it silences

VERBS = {
    "plan": "print the stages, their settings and the exact commands; run nothing",
    "run": "run the pipeline, or one stage and what it needs; skips finished stages, continues stopped ones",
    "make": "make one stage whose inputs are finished, in this process",
    "generate": "ask the teachers of a stage, in one part of the prompts with task=K; make then finishes the stage",
    "prepare": "tokenize, mask and pack the rows of a training stage",
    "inspect": "show prepared rows token by token: which tokens train, and why; or synthetic data with its verdicts",
    "bench": "measure the speed and memory of a training stage by a few steps on random weights; writes nothing",
    "doctor": "check the model, template and data of a training stage on a sample of its rows",
    "eval": "evaluate a stage's model; stage=checkpoint is the model that the pipeline starts from",
    "compare": "compare runs of one pipeline with several seeds: means, ranges, a plot of their sweeps",
    "merge": "merge checkpoint folders by a weighted mean, a mergekit method or a mergekit YAML file",
    "import": "write a pipeline from a YAML file of TRL, alignment-handbook or Axolotl, and list what differs",
    "export": "convert a checkpoint for another runtime and compare the scores of both",
    "serve": "print the command that serves a teacher, for vLLM, SGLang, transformers or llama.cpp; --run runs it",
    "push": "copy a stage's synthetic rows, their card and provenance to the Hub or another file system",
    "adopt": "check a checkpoint folder from elsewhere and write its manifest",
}
WITH_WORDS = set(VERBS) - {"compare", "merge", "import", "export", "serve", "push", "adopt"}  # that compose a recipe
EPILOG = """key=value words are Hydra overrides. pipeline=, model=, data= and accelerate=NAME choose files in recipes/
or in a --recipes FOLDER. pipeline=./FILE.yaml uses that file. stage=NAME chooses a stage. Every other field is set by
its full key, e.g. stages.sft.learning_rate=1e-4."""
HYDRA_FLAGS = {  # of Hydra's own command line -> what to use here
    ("-m", "--multirun"): "a pipeline is one run; loop over the values in the shell, with a run_dir=FOLDER for each",
    ("-i", "--info"): "smolpost plan shows stages and commands, smolpost plan --cfg job the recipe",
    ("-cp", "--config-path", "-cd", "--config-dir"): "--recipes FOLDER names a folder of recipes",
    ("-cn", "--config-name"): "pipeline=NAME or pipeline=./FILE.yaml chooses the recipe",
    ("-p", "--package"): "smolpost plan --cfg job prints the recipe from its root",
    ("-r", "--run", "--hydra-help", "-sc", "--shell-completion", "--experimental-rerun"): "leave it out",
}


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """The one place where a user's mistake, a disk that takes no more and a signal become a line and an exit code."""
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
    parser = argparse.ArgumentParser(prog="smolpost", description=__doc__, epilog=EPILOG)
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="verb")
    for verb, text in VERBS.items():
        sub = verbs.add_parser(verb, help=text, description=text, epilog=EPILOG)
        sub.set_defaults(verb=verb)
        if verb == "adopt":
            sub.add_argument("folder", type=Path)
            continue
        if verb == "merge":
            add_merge_arguments(sub)
            continue
        if verb == "import":
            add_import_arguments(sub)
            continue
        if verb == "export":
            sub.add_argument("kind", choices=["onnx", "mlx", "gguf", "vllm-config"])
            sub.add_argument("checkpoint", type=Path)
            sub.add_argument("out", type=Path)
            sub.add_argument("--lengths", type=int, nargs="+", help="tokens of prompt and answer; default 256 1024")
            sub.add_argument("--prompts", type=int, default=8, help="prompts per length; default 8")
            sub.add_argument("--max-recall-drop", type=float, default=0.02, help="allowed at any length; default 0.02")
            sub.add_argument("--llama-cpp", type=Path, metavar="FOLDER", help="its sources, for gguf; or LLAMA_CPP")
            continue
        if verb == "serve":
            sub.add_argument("teacher", metavar="TEACHER", help="a file of recipes/teacher, or a checkpoint folder")
            sub.add_argument("--server", choices=OWN_SERVERS, help="instead of the one that the teacher's recipe names")
            sub.add_argument("--run", action="store_true", help="run the command here, in the foreground")
            sub.add_argument(
                "--recipes", action="append", default=[], metavar="FOLDER", help="searched before the library's recipes"
            )
            continue
        if verb == "push":
            sub.add_argument("folder", type=Path)
            sub.add_argument("target", metavar="OWNER/NAME or URL", help="dataset of the Hub, or s3://..., file:///...")
            sub.add_argument("--no-provenance", action="store_true", help="leave out the teachers' raw replies")
            sub.add_argument("--replace", action="store_true", help="replace other rows that were pushed there")
            sub.add_argument("--public", action="store_true", help="a dataset of the Hub that all can read")
            continue
        if verb == "compare":
            sub.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR/PIPELINE")
            sub.add_argument("--plot", type=Path, metavar="FILE", help="draw the runs' sweeps: .png or .svg")
            sub.add_argument("--markdown", action="store_true", help="print the table in Markdown")
            continue
        sub.add_argument("words", nargs="*", metavar="FOLDER or key=value" if verb == "inspect" else "key=value")
        sub.add_argument(
            "--recipes", action="append", default=[], metavar="FOLDER", help="searched before the library's recipes"
        )
        if verb == "inspect":
            sub.add_argument("--source", help="show only rows of this source")
            sub.add_argument(
                "--row", help="show only this row: FILE:NUMBER, or NUMBER with --source; or the id of a prompt"
            )
            sub.add_argument("--pack", type=int, help="show only this pack or pair, counted from 0")
            sub.add_argument("--limit", type=int, help="packs, pairs, documents or prompts to show")
            sub.add_argument("--html", type=Path, metavar="FILE", help="write a page for a browser instead")
        if verb == "plan":
            sub.add_argument("--cfg", choices=["job"], help="print the composed recipe as YAML instead")
            sub.add_argument("--resolve", action="store_true", help="with --cfg: print values of interpolations")
            sub.add_argument("--fidelity", action="store_true", help="compare the values with those that are published")
        if verb == "doctor":
            sub.add_argument("--rows", type=int, default=32, help="rows in the sample; default 32")
            sub.add_argument("--against", choices=["trl"], help="compare the first steps by our engine and by TRL's")
    argv = sys.argv[1:] if argv is None else argv
    # Words and options in any order, which a parser of verbs does not give its verbs.
    chosen = verbs.choices.get(argv[0]) if argv else None
    with one_line_errors():
        if chosen and argv[0] in WITH_WORDS:
            _check_flags(argv)
        options = chosen.parse_intermixed_args(argv[1:]) if chosen else parser.parse_args(argv)
        if argv[0] in WITH_WORDS:
            options.words = [*(f"--recipes={folder}" for folder in options.recipes), *options.words]
        sys.exit(_do(options))


def _check_flags(argv: list[str]) -> None:
    for flag in (word.partition("=")[0] for word in argv[1:]):
        remedy = next((remedy for flags, remedy in HYDRA_FLAGS.items() if flag in flags), None)
        if flag in ("--cfg", "-c", "--resolve") and argv[0] != "plan":
            remedy = "smolpost plan --cfg job prints the recipe"
        if remedy:
            raise UserError(f"{flag} is a flag of Hydra's own command line; {remedy}")


def _do(options: argparse.Namespace) -> int:
    from smolpost import recipe
    from smolpost.pipeline import run, steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    if options.verb == "adopt":
        steps.adopt(options.folder)
        return 0
    console = screen.console()
    if options.verb == "compare":
        return _compare(options, console)
    if options.verb == "export":
        return _export(options, console)
    if options.verb == "serve":
        return _serve(options)
    if options.verb == "push":
        return _push(options, console)
    if options.verb in ("import", "merge"):
        from smolpost.importing.command import import_command
        from smolpost.merging.command import merge_command

        command = import_command if options.verb == "import" else merge_command
        return command(**{name: value for name, value in vars(options).items() if name != "verb"})
    if options.verb == "inspect":
        return _inspect(options, console)
    if options.verb == "plan" and options.cfg:
        print(recipe.as_yaml(options.words, resolve=options.resolve), end="")
        return 0
    if options.verb == "bench":
        return _bench(options, console)
    if options.verb in ("make", "generate"):
        return _make(options)
    request = recipe.load(options.words)
    if options.verb == "plan" and options.fidelity:
        return _fidelity(request, console)
    if options.verb == "plan":
        run.describe(request, console)
        return 0
    if options.verb == "run":
        return run.run(request, console)
    lineage = Lineage(request, look_up=True)
    if options.verb == "eval" and request.stage == "checkpoint":
        return _evaluate(lineage, "checkpoint", console)
    stage = lineage.stages[select_one(lineage.stages.planned.values(), request.stage).name]
    if options.verb == "prepare":
        steps.prepare(lineage, stage)
    elif options.verb == "eval":
        return _evaluate(lineage, stage.name, console)
    else:
        return _doctor(lineage, stage, options, console)
    return 0


def _fidelity(request, console: Console) -> int:
    from smolpost.fidelity.show import terminal
    from smolpost.fidelity.table import sections
    from smolpost.pipeline.plan import plan, select

    asked = select(plan(request), request.stage)
    for part in terminal(sections(request.recipe, list(dict.fromkeys(stage.entry for stage in asked)))):
        console.print(part)
    return 0


def _bench(options: argparse.Namespace, console: Console) -> int:
    from smolpost import recipe
    from smolpost.pipeline.bench import bench

    words, steps = _taken(options.words, "steps", "a number of optimizer steps", 1, 20)
    return bench(recipe.load(words), 20 if steps is None else steps, console)


def _make(options: argparse.Namespace) -> int:
    from smolpost import recipe
    from smolpost.pipeline import steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    words, task = _taken(options.words, "task", "the number of a task", 0, 0)
    words, rows = _taken(words, "preview", "a number of prompts", 1, 10)
    if task is not None and (options.verb != "generate" or rows is not None):
        raise UserError(f"task={task} goes with `smolpost generate`, without preview; leave it out")
    lineage = Lineage(request := recipe.load(words), look_up=True)
    stage = lineage.stages[select_one(lineage.stages.planned.values(), request.stage).name]
    if rows is not None:
        steps.preview(lineage, stage, rows)
    elif options.verb == "generate":
        steps.generate(lineage, stage, task)
    elif stage.config.LAUNCHED:
        launch = screen.command_line(stage.making[-1])
        raise UserError(f"stage={stage.name} is trained by a launcher; run `{launch}`, or `smolpost run`")
    else:
        steps.make(lineage, stage)
    return 0


def _taken(words: list[str], name: str, what: str, least: int, example: int) -> tuple[list[str], int | None]:
    """The words that are for the recipe, and the number that the last word NAME=NUMBER gives; None without one.

    Raises:
        UserError: It is not a whole number of at least `least`.
    """
    given = [word.removeprefix(f"{name}=") for word in words if word.startswith(f"{name}=")]
    number = given[-1] if given else None
    if number is not None and not (number.isascii() and number.isdigit() and int(number) >= least):
        raise UserError(f"{name}={number} is not {what}; give one from {least}, such as {name}={example}")
    return [word for word in words if not word.startswith(f"{name}=")], None if number is None else int(number)


def _doctor(lineage, stage, options: argparse.Namespace, console: Console) -> int:
    if options.against:
        from smolpost.doctor import two_engines

        compared = two_engines.compare_engines(lineage, stage, rows=options.rows)
        console.print(two_engines.report(compared))
        return two_engines.exit_code(compared)
    from smolpost.doctor import checks

    found = checks.diagnose(lineage, stage, rows=options.rows)
    console.print(checks.report(found))
    return checks.exit_code(found)


def _evaluate(lineage, stage: str, console: Console) -> int:
    from smolpost.pipeline import steps
    from smolpost.report.heat_map import DEPTH, heat_map_table, save_heat_map
    from smolpost.report.score_tables import scores_table

    root, found = steps.evaluate(lineage, stage)
    console.print(scores_table(found))
    for task, result in found.items():
        if any(DEPTH in metric for metric in result["scores"]):
            console.print(heat_map_table(result["scores"], f"{stage}: {task} by length and depth"))
            if disks.is_writable(root):
                save_heat_map(result["scores"], root / f"{task}.png", f"{stage}: {task}")
    console.print(f"{stage}: scores in {root}, every sample beside them", soft_wrap=True)
    return 0


def _compare(options: argparse.Namespace, console: Console) -> int:
    from smolpost.report.compare import compare_table, evaluations, markdown_table, sweeps
    from smolpost.report.pareto import save_pareto

    runs = [evaluations(folder) for folder in options.folders]
    if options.markdown:
        print(markdown_table(runs))
    else:
        console.print(compare_table(runs))
        console.print("n and 95% intervals of each run: results.json in its folder", soft_wrap=True)
    if options.plot:
        reports = [report for folder in options.folders for report in sweeps(folder)]
        if not reports:
            raise UserError(f"--plot {options.plot} draws sweeps, and these runs have no sweep stage")
        save_pareto(reports, options.plot)
        console.print(f"{options.plot}: {len(reports)} sweeps", soft_wrap=True)
    return 0


def _export(options: argparse.Namespace, console: Console) -> int:
    from smolpost.export.command import export_command

    return export_command(
        options.kind,
        options.checkpoint,
        options.out,
        console,
        lengths=options.lengths,
        num_prompts=options.prompts,
        max_recall_drop=options.max_recall_drop,
        llama_cpp=options.llama_cpp,
    )


def _serve(options: argparse.Namespace) -> int:
    from smolpost import recipe

    is_folder = (Path(options.teacher) / "config.json").is_file()
    teacher = Teacher(model=options.teacher) if is_folder else recipe.teacher(options.teacher, options.recipes)
    chosen = teacher.server
    teacher.server = options.server or chosen
    words = serve_command(teacher)
    for line in notes(teacher, chosen):
        print(f"smolpost: {line}", file=sys.stderr)
    print(screen.command_line(words), flush=True)
    if options.run:
        os.execv(program(teacher.server, words[0]), words)
    return 0


def _push(options: argparse.Namespace, console: Console) -> int:
    from smolpost.synthesis.push import push

    line = push(
        options.folder,
        options.target,
        with_provenance=not options.no_provenance,
        replace=options.replace,
        public=options.public,
    )
    console.print(line, soft_wrap=True)
    return 0


def _inspect(options: argparse.Namespace, console: Console) -> int:
    from smolpost.report.inspect import Prepared
    from smolpost.report.page import write_page
    from smolpost.report.samples import is_generated
    from smolpost.report.terminal import show

    if options.limit is not None and options.limit < 1:
        raise UserError(f"--limit {options.limit} is below 1")
    folder = _inspected_folder(options.words)
    if is_generated(folder):
        return _inspect_samples(folder, options, console)
    prepared = Prepared(folder)
    chosen = {"source": options.source, "row": options.row}
    if options.html is None:
        show(prepared, console, pack=options.pack, limit=options.limit or 1, **chosen)
        return 0
    if options.pack is not None:
        raise UserError("--pack is for the terminal; a page shows all packs, or those of --source and --row")
    _written(options.html, write_page(prepared, options.html, limit=options.limit or 200, **chosen), console)
    return 0


def _inspect_samples(folder: Path, options: argparse.Namespace, console: Console) -> int:
    """Show synthetic data; --row is the id of a prompt there."""
    from smolpost.report.samples import Samples
    from smolpost.report.samples_page import write_samples_page
    from smolpost.report.show_samples import show_samples

    if options.pack is not None:
        raise UserError(f"--pack is for prepared rows, and {folder} holds synthetic data; --row ID shows one prompt")
    samples, chosen = Samples(folder), {"source": options.source, "identity": options.row}
    if options.html is None:
        show_samples(samples, console, limit=options.limit or 5, **chosen)
    else:
        size = write_samples_page(samples, options.html, limit=options.limit or 200, **chosen)
        _written(options.html, size, console)
    return 0


def _written(page: Path, size: int, console: Console) -> None:
    console.print(f"{page}: {size / 1000:,.0f} kB; open it in a browser, ? in it lists the keys", soft_wrap=True)


def _inspected_folder(words: list[str]) -> Path:
    """The folder that is named, or that of the stage that the words choose: its synthetic data or its prepared rows."""
    from smolpost import recipe
    from smolpost.pipeline import manifest
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one
    from smolpost.report.samples import is_generated

    if len(words) == 1 and "=" not in Path(words[0]).name:
        return Path(words[0])
    request = recipe.load(words)
    lineage = Lineage(request)
    stage = lineage.stages[select_one(lineage.stages.planned.values(), request.stage).name]
    if stage.finished() and is_generated(stage.folder):
        return stage.folder
    if stage.replies:
        run = screen.command_line(["smolpost", "run", *words])
        raise UserError(f"stage={stage.name} has no rows yet; `{run}` makes them")
    if stage.prepared is None or not manifest.read(stage.prepared):
        make = screen.command_line(["smolpost", "prepare", *words])
        raise UserError(f"stage={stage.name} has no prepared rows; `{make}` makes those of a training stage")
    return stage.prepared


def job(kind: str) -> None:
    """Run a script of data_gen/ or merge/: make the stage that its command line names, or preview=N of it.

    Args:
        kind: The stage kind that the script makes.
    """
    from smolpost import recipe
    from smolpost.pipeline import steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one

    with one_line_errors():
        words, rows = _taken(sys.argv[1:], "preview", "a number of prompts", 1, 10)
        lineage = Lineage(request := recipe.load(words), look_up=True)
        stage = select_one(lineage.stages.planned.values(), request.stage)
        if stage.config.kind != kind:
            raise UserError(f"stage={stage.name} is of kind {stage.config.kind}; this job makes {kind} stages")
        if rows is not None:
            steps.preview(lineage, lineage.stages[stage.name], rows)
        else:
            steps.make(lineage, lineage.stages[stage.name])


if __name__ == "__main__":
    main()
