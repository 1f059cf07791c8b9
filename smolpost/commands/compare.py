"""smolpost compare: runs of one pipeline with several seeds."""

import argparse
from pathlib import Path

from smolpost import screen
from smolpost.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_DIR/PIPELINE")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the runs' sweeps: .png or .svg")
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")


def command(options: argparse.Namespace) -> int:
    from smolpost.report.compare import compare_table, evaluations, markdown_table, sweeps
    from smolpost.report.pareto import save_pareto

    console = screen.console()
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
