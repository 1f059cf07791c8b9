"""Is there something to measure? Asked before hours of training, not after them."""

from smolpost.chat.render import load_template
from smolpost.errors import UserError
from smolpost.evaluation.task import EvaluationTask
from smolpost.pipeline.lineage import Lineage, Located
from smolpost.pipeline.steps import context, input_folders


def check_measurable(lineage: Lineage, stage: Located) -> None:
    """Refuse, before a training stage runs, an evaluation of its model that has no row to ask.

    Tasks whose rows a stage is still to write are left for later.

    Raises:
        UserError: A task has nothing to measure, or cannot use a row.
    """
    from transformers import AutoTokenizer

    spec = lineage.recipe.evaluation.tasks
    ready = [name for name in stage.evaluation if spec[name].mixtures() and _written(lineage, spec[name])]
    if not ready:
        return
    tokenizer = AutoTokenizer.from_pretrained(input_folders(lineage, stage)[stage.base])
    tokenizer.chat_template = load_template(stage.config.template_of(lineage.recipe.stages))
    shared = context(lineage, ready)
    for name in ready:
        if not spec[name].build(name, shared).items(tokenizer):
            read = " and ".join(f"data.{mixture}" for _, mixture in spec[name].mixtures())
            raise UserError(
                f"evaluation.tasks.{name} has nothing to measure: no row of {read} can be asked; "
                f"change its rows, or leave the task out with ~evaluation.tasks.{name}"
            )


def _written(lineage: Lineage, task: EvaluationTask) -> bool:
    """All rows that the task reads are there."""
    sources = [s for _, mixture in task.mixtures() for s in lineage.recipe.data[mixture].sources.values()]
    return all(lineage.stages[source.stage].finished() for source in sources if source.stage)
