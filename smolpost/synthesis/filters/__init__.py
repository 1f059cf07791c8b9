"""Which replies become rows: filters that return a verdict each, in one order, cheap ones first.

A filter that is off gives no verdict. All that are on give theirs, so that a row's provenance shows each of them. What
depends on earlier rows (`shared.without_near_duplicates`) or on both sides of a pair (`sides`) comes after these.
"""

from collections.abc import Mapping, Sequence

from smolpost.chat.render import text_of
from smolpost.data.hygiene import HygieneFilter, check_installed
from smolpost.schema import Hygiene
from smolpost.synthesis.filters import form
from smolpost.synthesis.filters.answer_workers import verify_answers
from smolpost.synthesis.filters.answers import reference_of
from smolpost.synthesis.filters.language import in_language, same_language
from smolpost.synthesis.filters.repetition import repetition
from smolpost.synthesis.filters.shared import uncontaminated
from smolpost.synthesis.records import Prompt, Reply, Sample, Verdict
from smolpost.synthesis.settings import Filters

ANSWER, ANSWER_LABEL = "answer", "answer_label"

Verdicts = dict[str, Verdict]  # filter -> what it says


def check_filters(settings: Filters, key: str) -> None:
    """Refuse filters that cannot work, before a teacher is asked.

    Args:
        key: Of the settings in the recipe, such as stages.traces.filters.
    Raises:
        UserError: An optional package is missing, or an evaluation file is missing or without text, or min_tokens is
            above max_tokens.
    """
    if settings.answer != "off":
        check_installed("math_verify", f"{key}.answer={settings.answer}")
    if settings.language:
        check_installed("lingua", f"{key}.language=true")
    HygieneFilter(Hygiene(near=settings.near, against=settings.against, ngram=settings.ngram), key=key)
    form.check_lengths(settings.min_tokens, settings.max_tokens, key)


def judge_sample(
    sample: Sample,
    prompt: Prompt,
    settings: Filters,
    *,
    thinking: bool | Sequence[bool | None] | None,
    language: str | None = None,
) -> Verdicts:
    """`judge_reply` of all replies: of each filter the first fault, else what it said of the last reply.

    Args:
        thinking: Whether the teacher was to think, for all replies or for each.
        language: As `judge_reply`.
    """
    modes = thinking if isinstance(thinking, Sequence) else [thinking] * len(sample.replies)
    found: Verdicts = {}
    for reply, mode in zip(sample.replies, modes, strict=True):
        verdicts = judge_reply(reply, sample, prompt, settings, thinking=mode, language=language)
        found |= {name: verdict for name, verdict in verdicts.items() if found.get(name, form.PASSED).passed}
    return {name: found[name] for name in ORDER if name in found}


def judge_reply(
    reply: Reply,
    sample: Sample,
    prompt: Prompt,
    settings: Filters,
    *,
    thinking: bool | None,
    language: str | None = None,
) -> Verdicts:
    """What each filter says of one reply.

    The last reply alone is compared with the row's answer, and it stands for the sample where evaluation files are
    looked for.

    Args:
        reply: One of the sample's.
        prompt: Its row's last assistant turn holds the right answer.
        thinking: Whether the teacher was to think; None: as its template decides.
        language: ISO 639-1 code that the reply should be in; None: that of the question.
    """
    is_last = reply is sample.replies[-1]
    content = reply.content or ""
    found: Verdicts = {}
    if settings.finished:
        found["finished"] = form.finished(reply)
    found["empty"] = form.not_empty(reply)
    if reply.tool_calls:
        found["calls"] = form.readable_calls(reply, prompt.row.get("tools"))
    if settings.think_format:
        found["think_format"] = form.think_format(reply, thinking)
    if settings.min_tokens or settings.max_tokens:
        found["length"] = form.length(reply, settings.min_tokens, settings.max_tokens)
    if settings.max_repetition is not None:
        found["repetition"] = repetition(reply, settings.max_repetition)
    if settings.language and language:
        found["language"] = in_language(content, language, settings.min_confidence)
    elif settings.language:
        found["language"] = same_language(_question(sample, reply), content, settings.min_confidence)
    if settings.against and is_last:
        found["against"] = uncontaminated(sample, settings.against, settings.ngram)
    if settings.answer != "off" and is_last:
        name = ANSWER if settings.answer == "keep" else ANSWER_LABEL
        [found[name]] = verify_answers([(reference_of(prompt.row), content)])
    return found


ORDER = (
    "finished",
    "empty",
    "calls",
    "think_format",
    "length",
    "repetition",
    "language",
    "against",
    ANSWER,
    ANSWER_LABEL,
)


def of_side(side: str, verdicts: Mapping[str, Verdict]) -> Verdicts:
    """Verdicts on one side of a pair: chosen.finished with the reason "chosen_cut"."""
    return {
        f"{side}.{name}": verdict if verdict.passed else verdict._replace(reason=f"{side}_{verdict.reason}")
        for name, verdict in verdicts.items()
    }


def first_fault(verdicts: Mapping[str, Verdict]) -> str:
    """The reason of the first filter that a reply does not pass; "" where it passes all. Labels drop nothing."""
    faults = (v.reason for name, v in verdicts.items() if not v.passed and not name.endswith(ANSWER_LABEL))
    return next(faults, "")


def _question(sample: Sample, reply: Reply) -> str:
    """Text of the last user turn before the turn that holds the reply."""
    texts = [(message.get("role"), text_of(message.get("content"))) for message in sample.messages]
    place = len(texts)
    for later in reversed(sample.replies):  # each one is in a turn before that of the next
        content = (later.content or "").strip()
        place = next((i for i in range(place - 1, -1, -1) if content in texts[i][1]), place)
        if later is reply:
            break
    return next((text for role, text in reversed(texts[:place]) if role == "user"), "")
