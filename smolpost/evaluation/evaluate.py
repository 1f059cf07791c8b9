"""One checkpoint through the whole evaluation, and the table of several."""

import time
from contextlib import contextmanager

from rich.box import SIMPLE_HEAD
from rich.table import Table

from smolpost.data.mixtures import mix
from smolpost.evaluation.heldout import MODES, accuracy, heldout_loss
from smolpost.evaluation.retrieval import retrieval


def evaluate(model, tokenizer, spec, mixture):
    """Run what the spec asks for; what it does not ask for is None.

    Args:
        model: A causal LM with a decoder `model` and a head `lm_head`.
        tokenizer: The checkpoint's, with its chat template.
        spec: A `smolpost.schema.Evaluation`.
        mixture: The `smolpost.schema.Mixture` that `spec.heldout` names; None skips loss and accuracy, too.
    Returns:
        Numbers fit for JSON:
        "loss": {"think": nats per trained token or None where no row has the mode, "no_think": alike};
        "accuracy": {"think": share right, in [0, 1], "no_think": alike};
        "retrieval": {"64": share of values found, in [0, 1]} with the length as text;
        "counts": trained tokens and rows behind the loss, prompts, rows passed over and share of cut replies behind
        the accuracy, mean prompt tokens behind the retrieval;
        "seconds": wall-clock time of each part that ran.
    Raises:
        UserError: A setting or a held-out row cannot be used, or the loss is not finite.
    """
    result = {"loss": None, "accuracy": None, "retrieval": None, "counts": {}, "seconds": {}}
    counts = result["counts"]
    if spec.heldout is not None and mixture is not None:
        rows = [row for _, row in mix(mixture)]
        shared = {"today": spec.today, "batch_size": spec.batch_size}
        with _timed(result, "loss"):
            loss = heldout_loss(model, tokenizer, rows, max_rows=spec.loss_rows, **shared)
        result["loss"] = {mode: loss[mode]["loss"] for mode in MODES}
        counts["loss_tokens"] = {mode: loss[mode]["tokens"] for mode in MODES}
        counts["loss_rows"] = {mode: loss[mode]["rows"] for mode in MODES}
        with _timed(result, "accuracy"):
            answered = accuracy(
                model,
                tokenizer,
                rows,
                answer_pattern=spec.answer_pattern,
                max_new_tokens=spec.max_new_tokens,
                max_rows=spec.accuracy_rows,
                **shared,
            )
        result["accuracy"] = {mode: answered[mode] for mode in MODES}
        counts["accuracy_prompts"] = answered["prompts"]
        counts["accuracy_unscored"] = answered["unscored"]
        counts["accuracy_cut"] = answered["cut"]
    if spec.retrieval is not None:
        with _timed(result, "retrieval"):
            found = retrieval(
                model, tokenizer, spec.retrieval, today=spec.today, seed=spec.seed, batch_size=spec.batch_size
            )
        result["retrieval"] = {str(length): at["found"] for length, at in found.items()}
        counts["retrieval_prompt_tokens"] = {str(length): at["prompt_tokens"] for length, at in found.items()}
    return result


def results_table(results):
    """Stages side by side.

    Args:
        results: Stage name -> what `evaluate` returned.
    Returns:
        A rich Table: one row per stage, `-` where there is no number.
    """
    lengths = sorted({length for result in results.values() for length in result["retrieval"] or {}}, key=int)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=0)  # ten columns in 80 characters
    table.add_column("stage", no_wrap=True)
    columns = [("loss", mode) for mode in MODES] + [("accuracy", mode) for mode in MODES]
    columns += [("retrieval", length) for length in lengths]
    names = {"loss": "loss", "accuracy": "acc.", "retrieval": "recall", "think": "think", "no_think": "no-th."}
    for part, key in columns:
        table.add_column(f"{names[part]}\n{names.get(key, key)}", justify="right", no_wrap=True)
    for stage, result in results.items():
        values = [(result[part] or {}).get(key) for part, key in columns]
        table.add_row(stage, *("-" if value is None else f"{value:.3f}" for value in values))
    return table


@contextmanager
def _timed(result, part):
    start = time.perf_counter()
    yield
    result["seconds"][part] = time.perf_counter() - start
