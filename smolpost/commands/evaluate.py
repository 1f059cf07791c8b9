"""smolpost eval: the scores of a stage's model."""

import argparse

from smolpost import disks, screen
from smolpost.commands.words import add_words, words_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_words(parser)


def command(options: argparse.Namespace) -> int:
    from smolpost import recipe
    from smolpost.pipeline import steps
    from smolpost.pipeline.lineage import Lineage
    from smolpost.pipeline.plan import select_one
    from smolpost.report.heat_map import DEPTH, heat_map_table, save_heat_map
    from smolpost.report.score_tables import scores_table
    from smolpost.stages.base import CHECKPOINT

    request = recipe.load(words_of(options))
    lineage = Lineage(request, look_up=True)
    stage = CHECKPOINT
    if request.stage != CHECKPOINT:
        stage = select_one(lineage.stages.planned.values(), request.stage).name
    root, found = steps.evaluate(lineage, stage)
    console = screen.console()
    console.print(scores_table(found))
    for task, result in found.items():
        if any(DEPTH in metric for metric in result["scores"]):
            console.print(heat_map_table(result["scores"], f"{stage}: {task} by length and depth"))
            if disks.is_writable(root):
                save_heat_map(result["scores"], root / f"{task}.png", f"{stage}: {task}")
    console.print(f"{stage}: scores in {root}, every sample beside them", soft_wrap=True)
    return 0
