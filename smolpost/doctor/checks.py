"""Checks whether a training stage would learn what it should.

A few of its rows, its template and its start checkpoint go through the training code, and the result is compared with
the messages. A failing check does not stop the others.
"""

from collections.abc import Callable
from dataclasses import dataclass

from rich.console import Group
from rich.table import Table
from rich.text import Text

from smolpost import schema
from smolpost.doctor import check_batches, check_texts
from smolpost.doctor.stage_sample import Case, NotChecked, examined, one_line
from smolpost.pipeline.lineage import Lineage, Located

STYLES = {"pass": "green", "fail": "bold red", "skip": "yellow"}
DOCUMENTS, PAIRS, COMPLETIONS = ("documents",), ("pairs",), ("completions", "labelled")
EVERY = DOCUMENTS + PAIRS + COMPLETIONS
# Name -> layouts of rows it is for, the check, the remedy with the recipe's names of {stage}, {data} and {template}.
CHECKS: dict[str, tuple[tuple[str, ...], Callable, str]] = {
    "rows": (
        EVERY,
        check_texts.rows_are_valid,
        "do what the line says, or delete these rows of data={data}",
    ),
    "template": (
        EVERY,
        check_texts.template_round_trip,
        "use a template whose renderings extend each other and a tokenizer that loses no text; stages.{stage}.template",
    ),
    "template tokens": (
        EVERY,
        check_texts.template_tokens,
        "start from a checkpoint that has them: smolpost add-tokens CHECKPOINT OUT --template {template}",
    ),
    "stop token": (
        EVERY,
        check_batches.replies_stop,
        "end each reply with a control token of the tokenizer inside its generation span; stages.{stage}.template",
    ),
    "mask": (
        DOCUMENTS,
        check_batches.mask_is_policy,
        "put {{% generation %}} around the reply and its stop token only; stages.{stage}.template",
    ),
    "shared prompt": (PAIRS, check_batches.prompt_is_shared, "report this as a bug of smolpost, with the pair"),
    "pair mask": (
        PAIRS,
        check_batches.pair_mask_is_policy,
        "put {{% generation %}} around the reply and its stop token alone; stages.{stage}.template",
    ),
    "completion mask": (
        COMPLETIONS,
        check_batches.completion_mask_is_policy,
        "put {{% generation %}} around the reply and its stop token alone; stages.{stage}.template",
    ),
    "control tokens": (
        EVERY,
        check_texts.users_write_no_control_tokens,
        "delete rows of data={data} in which users write such tokens, and report this as a bug of smolpost",
    ),
    "packing": (
        DOCUMENTS,
        check_batches.packed_equals_unpacked,
        f"set model.attn_implementation={schema.PACKED_ATTENTION}, which separates documents",
    ),
    "pairs": (
        PAIRS,
        check_batches.pair_equals_two_sequences,
        f"set model.attn_implementation={schema.PACKED_ATTENTION}, which separates the sides",
    ),
    "reference loss": (
        PAIRS,
        check_batches.loss_at_reference,
        "report this as a bug of smolpost, with the stage's settings",
    ),
    "accumulation": (
        DOCUMENTS + PAIRS,
        check_batches.accumulation,
        "report this as a bug of smolpost, with the model's config.json",
    ),
    "equal pairs": (
        PAIRS,
        check_batches.sides_differ,
        "delete the pairs of data={data} whose sides render to the same text",
    ),
    "chat parity": (
        EVERY,
        check_texts.chat_parity,
        "set stages.{stage}.template to the one that the checkpoint was trained with, or "
        "stages.{stage}.allow_template_change=true if the change is intended; a tokenizer has to stay the same, and a "
        "template's generation prompt has to be what it writes before a reply",
    ),
    "vocabulary": (
        EVERY,
        check_batches.vocabulary,
        "resize and initialise the checkpoint's embeddings for its tokenizer; use a tokenizer that knows the text",
    ),
    "lengths": (
        EVERY,
        check_texts.lengths,
        "raise stages.{stage}.max_seq_len, or set stages.{stage}.overlong=truncate or drop; keep rows within "
        "the model's context, or raise stages.{stage}.max_position_embeddings",
    ),
}


@dataclass(frozen=True)
class Check:
    """What one check found.

    Attributes:
        status: pass | fail | skip.
        detail: The finding, with numbers; for a skipped check, the reason.
        remedy: What to do after a fail, else "".
    """

    name: str
    status: str
    detail: str
    remedy: str = ""


def diagnose(lineage: Lineage, stage: Located, *, rows: int = 32) -> list[Check]:
    """Check a training stage on a sample of its rows; nothing is kept.

    Args:
        stage: One that trains; its start checkpoint is finished.
        rows: Size of the sample, from the first 500 rows of each source that the mixture takes. At most 4 also run a
            model above 1e9 parameters on a CPU.
    Returns:
        The checks in their order.
    Raises:
        UserError: The stage does not train, its start or data are missing or cannot be trained, or rows is below 1.
    """
    found = []
    with examined(lineage, stage, rows) as case:
        for name, (layouts, examine, remedy) in CHECKS.items():
            if case.config.layout in layouts:
                found.append(_one_check(case, name, examine, remedy))
                if found[-1].status == "fail":
                    case.failed.add(name)
    return found


def _one_check(case: Case, name: str, examine: Callable, remedy: str) -> Check:
    try:
        passed, detail = examine(case)
    except NotChecked as reason:
        return Check(name, "skip", str(reason))
    except Exception as error:  # an exception is a finding; the other checks continue
        passed, detail = False, one_line(error)
    if passed:
        return Check(name, "pass", detail)
    names = {"stage": case.stage.entry, "data": case.config.data, "template": case.config.template}
    return Check(name, "fail", detail, remedy.format(**names))


def exit_code(found: list[Check]) -> int:
    """1 if a check failed, else 0."""
    return int(any(check.status == "fail" for check in found))


def report(found: list[Check]) -> Group:
    """A line per check, a remedy under each one that failed, and the verdict."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column()
    for check in found:
        table.add_row(Text(check.status, STYLES[check.status]), check.name, Text(check.detail))
        if check.remedy:
            table.add_row("", "", Text(f"remedy: {check.remedy}", "italic"))
    failed = [check.name for check in found if check.status == "fail"]
    skipped = [check.name for check in found if check.status == "skip"]
    verdict = f"{len(failed)} of {len(found)} checks failed: {', '.join(failed)}" if failed else "no check failed"
    if skipped:
        verdict += f"; {len(skipped)} skipped: {', '.join(skipped)}"
    return Group(table, Text(verdict, "bold"))
