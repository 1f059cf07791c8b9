"""Reasoning and answer of a reply, however the think block was written or cut."""

_OPEN, _CLOSE = "<think>", "</think>"


def split_reasoning(text, *, opened_in_prompt=False):
    """Split a reply into its reasoning and its answer.

    A closed block is reasoning, several are joined by a line break. Text before a lone `</think>` is reasoning whose
    opening tag stood in the prompt. A reply that ends inside its opening block was cut by length: all of it is
    reasoning. The smollm3 template renders this answer in no-think mode.

    Args:
        text: The reply, as decoded without its stop token.
        opened_in_prompt: The prompt ended inside a think block, so a reply without `</think>` was cut inside it.
    Returns:
        (reasoning, answer): reasoning is None without a think block and "" for an empty one; both without the line
        breaks that set the block apart.
    """
    if opened_in_prompt and not text.lstrip().startswith(_OPEN):
        text = _OPEN + text
    *closed, rest = text.split(_CLOSE)
    reasoning, answer = [], []
    for piece in closed:
        before, opening, inside = piece.partition(_OPEN)
        if opening and before.strip():
            answer.append(before)
        reasoning.append(inside if opening else piece)
    if rest.lstrip().startswith(_OPEN):
        reasoning.append(rest.lstrip().removeprefix(_OPEN))
    else:
        answer.append(rest)
    inner = [part.strip("\n") for part in reasoning]
    return ("\n".join(part for part in inner if part) if inner else None), "".join(answer).lstrip("\n")


def reasoning_ranges(text):
    """Where a reply's reasoning stands, as `split_reasoning` finds it, with its tags.

    Args:
        text: The reply; a stop token at its end belongs to reasoning that was cut by length.
    Returns:
        [(start, end)] ascending; blocks with nothing but white space in them are none.
    """
    ranges, done = [], 0
    while (close := text.find(_CLOSE, done)) >= 0:
        opening = text.find(_OPEN, done, close)
        start = done if opening < 0 else opening
        if text[start:close].removeprefix(_OPEN).strip():
            ranges.append((start, close + len(_CLOSE)))
        done = close + len(_CLOSE)
    if text[done:].lstrip().startswith(_OPEN):
        ranges.append((done, len(text)))
    return ranges
