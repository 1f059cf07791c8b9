"""What of a reply is scored, the same for every harness."""

from smolpost.chat.reasoning import split_reasoning


def answer_of(text: str, stops: list[str], *, thinks: bool) -> str:
    """The text after the thoughts, up to the first stop string.

    Args:
        thinks: Whether the reply may hold a think block; otherwise all of it is the answer.
    """
    answer = split_reasoning(text)[1].lstrip() if thinks else text
    for stop in filter(None, stops):
        answer = answer.split(stop)[0]
    return answer
