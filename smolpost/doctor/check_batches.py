"""The doctor's checks of the collated batch and of the model that is trained on it.

Each result is derived a second time in another way: labels by prefixes instead of generation spans, documents one by
one instead of packed, a loss by hand. A check takes a Case and returns (passed, detail); it raises NotChecked if it
does not apply.
"""

from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import numpy as np

from smolpost.chat.fates import Fate
from smolpost.chat.masks import Policy, encode, trained_by_prefixes
from smolpost.chat.render import clean_messages
from smolpost.chat.text_pieces import vocabulary_of
from smolpost.data.collate import IGNORE_INDEX
from smolpost.data.tokenize import check_tags
from smolpost.data.tokenized import policy_of
from smolpost.doctor.stage_sample import Case, NotChecked, conversations, difference
from smolpost.errors import UserError


class Derived(NamedTuple):
    """[L] ids of a conversation, and [L] whether each is in a reply that trains."""

    ids: np.ndarray
    is_reply: np.ndarray


class CollatedDocument(NamedTuple):
    """A document of the collated batch, with all or a part of its row: [L] ids and labels.

    Attributes:
        replies: [L] the replies that train, by prefixes; None for a text, or if the template rewrites turns.
        is_whole: Whether it has all of the conversation.
    """

    row: dict
    ids: np.ndarray
    labels: np.ndarray
    replies: np.ndarray | None
    is_whole: bool


def _derived(case: Case, row: dict, messages: list[dict]) -> Derived | None:
    """Replies by the differences of rendered prefixes; None if the template rewrites earlier turns."""
    policy = Policy() if "all" in case.config.train_roles else policy_of(case.config)
    try:
        found = trained_by_prefixes(case.tokenizer, messages, **case.options(row), policy=policy)
    except UserError:
        return None
    return Derived(np.array(found.input_ids, np.int32), np.array(found.fates) == Fate.TRAINED)


def runs(flags: np.ndarray) -> list[slice]:
    """The runs of set flags."""
    found, place = [], 0
    for is_set, group in groupby(flags.tolist()):
        length = len(list(group))
        if is_set:
            found.append(slice(place, place + length))
        place += length
    return found


def documents(case: Case) -> Iterator[CollatedDocument]:
    """The documents of the batch that the trainer's collate function makes from the prepared sample.

    Raises:
        UserError: A document's tokens are not those of its text.
    """
    from smolpost.training import sft

    packs = case.arrays
    batch = sft.collate_packs(packs)
    ids, labels = (batch[key][0].numpy() for key in ("input_ids", "labels"))
    numbers = np.concatenate([pack["rows"] for pack in packs])
    ends = np.cumsum(batch["document_lengths"])
    for number, length, end in zip(numbers, batch["document_lengths"], ends, strict=True):
        row, span = case.fitting[number], slice(end - length, end)
        whole = _derived(case, row, row["messages"]) if conversations(row) else None
        replies, is_labelled = None, labels[span] != IGNORE_INDEX
        if whole is not None:
            pieces = [whole.is_reply[start : start + length].copy() for start in _places(whole.ids, ids[span])]
            if not pieces:
                raise UserError(f"{row.where}: its {length} tokens are not those of its text")
            for piece in pieces:
                piece[0] = False  # nothing predicts it
            # A short part of a cut row may occur at several places.
            replies = next((piece for piece in pieces if (piece == is_labelled).all()), pieces[0])
        is_whole = whole is not None and length == len(whole.ids)
        yield CollatedDocument(row, ids[span], labels[span], replies, is_whole)


def _places(ids: np.ndarray, piece: np.ndarray) -> list[int]:
    """The indices at which a part of the ids may begin."""
    size, text, place, found = ids.dtype.itemsize, ids.tobytes(), -1, []
    sought = piece.astype(ids.dtype).tobytes()
    while (place := text.find(sought, place + 1)) != -1:
        if place % size == 0:
            found.append(place // size)
    return found


def _texts_of(case: Case, ids: np.ndarray, flags: np.ndarray) -> list[str]:
    return [case.decode(ids[run]) for run in runs(flags)]


def _check_policy(case: Case) -> None:
    """
    Raises:
        NotChecked: Prefixes cannot derive this policy.
    """
    roles = case.config.train_roles
    if roles not in (["assistant"], ["all"]):
        raise NotChecked(f"train_roles={roles}: prefixes give only replies, not {', '.join(roles)} turns")


def _check_earlier(case: Case) -> None:
    """
    Raises:
        NotChecked: What failed earlier leaves no rows to look at.
    """
    if earlier := case.failed & {"rows", "template", "stop token"}:
        case.need("prepared_rows", ", ".join(sorted(earlier)))


def mask_is_policy(case: Case) -> tuple[bool, str]:
    """The text under the labels of the collated batch is the text of the policy."""
    _check_policy(case)
    _check_earlier(case)
    check_tags(case.config, case.trainable, case.tokenizer, set())
    faults, num_labelled, num_named, num_checked, num_left = [], 0, 0, 0, 0
    for document in documents(case):
        row, ids, labels, flags, _ = document
        if not conversations(row) or case.config.train_roles == ["all"]:
            flags = np.arange(len(ids)) > 0
        if flags is None:
            num_left += 1
            continue
        is_labelled = labels != IGNORE_INDEX
        num_checked += 1
        num_labelled += int(is_labelled.sum())
        num_named += int(flags.sum())
        found, expected = _texts_of(case, labels, is_labelled), _texts_of(case, ids, flags)
        if found != expected:
            faults.append(f"{row.where}: {difference(''.join(expected), ''.join(found))}")
    if num_left and not num_checked:
        raise NotChecked(f"the template rewrites earlier turns in all {num_left} documents, see template")
    detail = f"{num_labelled:,} tokens labelled, {num_named:,} named by the policy, in {num_checked} documents"
    return not faults, f"{detail}; {len(faults)} differ" + (f", the first {faults[0]}" if faults else "")


def replies_stop(case: Case) -> tuple[bool, str]:
    """Every reply ends with a control token, which trains, and the trained model will stop there."""
    from smolpost.training.stop_tokens import stop_tokens

    known, ends = vocabulary_of(case.tokenizer).stops, []
    for row in case.need("sample", "rows"):
        for messages in conversations(row):
            replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
            texts = [case.render(row, messages[: i + 1]).rstrip("\n") for i in replies]
            ends += [next((token for token in known if text.endswith(token)), None) for text in texts]
    found = {token: case.tokenizer.convert_tokens_to_ids(token) for token in dict.fromkeys(ends) if token}
    detail = f"{len(ends) - ends.count(None)} of {len(ends)} replies end with {', '.join(found) or 'a control token'}"
    try:
        last = list(_last_tokens(case))
    except (NotChecked, UserError):  # there are no labels to look at, see mask
        return None not in ends, detail
    stops = stop_tokens(case.stage.entry, case.config, case.prepared_rows, case.start, case.tokenizer)
    trains = [is_cut or token in found.values() for token, is_cut in last]
    num_cut = sum(is_cut for _, is_cut in last)
    before, after = stops.report["generation"]["before"], stops.generation
    detail += f", which trains in {sum(trains) - num_cut} of {len(last) - num_cut} ({num_cut} cut); the start "
    detail += f"checkpoint stops at the ids {before}, the trained model at {after}"
    return None not in ends and all(trains) and set(found.values()) <= {*after}, detail


def _last_tokens(case: Case) -> Iterator[tuple[int, bool]]:
    """The last token of each reply if it trains, else -100; and whether the reply is truncated there."""
    case.need("prepared_rows", "mask and lengths")
    if case.config.layout == "pairs":
        for _, _, side, _ in _pair_sides(case):
            yield (int(side[-1]) if len(side) else IGNORE_INDEX), False
        return
    if case.config.layout != "documents":
        for row in case.arrays:
            ids = row["completion_ids"][row["completion_mask"] == 1]
            yield int(ids[-1]), len(row["prompt_ids"]) + len(row["completion_ids"]) == case.config.max_seq_len
        return
    for _, _, labels, replies, is_whole in documents(case):
        for run in runs(replies) if replies is not None else []:
            yield int(labels[run][-1]), not is_whole and run.stop == len(labels)


# ---------------------------------------------------------------- pairs


def _pair_sides(case: Case) -> Iterator[tuple[dict, str, np.ndarray, dict]]:
    """(row, chosen or rejected, [S] ids that are scored, prepared pair) of the sides in the collated batch."""
    from smolpost.training import reference

    case.need("prepared_rows", "shared prompt and lengths")
    pairs = case.arrays
    batch = reference.collate_pairs(pairs)
    for number, pair in enumerate(pairs):
        for i, side in enumerate(("chosen", "rejected")):
            tokens = batch["side_tokens"][batch["sides"] == 2 * number + i]
            yield case.fitting[pair["rows"][0]], side, batch["targets"][tokens].numpy(), pair


def prompt_is_shared(case: Case) -> tuple[bool, str]:
    """Prompt and completion equal, token by token, the beginning and almost all of the side's own conversation."""
    _check_earlier(case)
    faults, num_shared, num_tokens = [], 0, 0
    pairs = case.need("arrays", "pair mask")
    for pair in pairs:
        row = case.fitting[pair["rows"][0]]
        num_shared += len(pair["prompt_ids"])
        for side in ("chosen", "rejected"):
            ids = encode(case.tokenizer, row[side], **case.options(row)).input_ids
            found = np.concatenate((pair["prompt_ids"], pair[f"{side}_ids"])).tolist()
            num_tokens += len(found)
            if found != ids[: len(found)] or case.decode(ids[len(found) :]).strip("\n"):
                faults.append(f"{row.where} {side}: {difference(case.decode(ids), case.decode(found))}")
    detail = f"{len(pairs)} pairs share {num_shared:,} of {num_tokens:,} tokens"
    return not faults, f"{detail}; {len(faults)} sides differ" + (f", the first {faults[0]}" if faults else "")


def pair_mask_is_policy(case: Case) -> tuple[bool, str]:
    """The scored text of the collated batch is the replies after the messages that both sides share."""
    _check_policy(case)
    check_tags(case.config, case.trainable, case.tokenizer, set())
    faults, num_scored, num_checked, num_left = [], 0, 0, 0
    for row, side, ids, _ in _pair_sides(case):
        whole = _derived(case, row, row[side])
        if whole is None:
            num_left += 1
            continue
        num_checked += 1
        num_scored += len(ids)
        replies = _texts_of(case, whole.ids, whole.is_reply)
        expected = "".join(replies if case.config.last_turn_only else replies[_num_shared_replies(case, row) :])
        if case.decode(ids) != expected:
            faults.append(f"{row.where} {side}: {difference(expected, case.decode(ids))}")
    if num_left and not num_checked:
        raise NotChecked(f"the template rewrites earlier turns in all {num_left} sides, see template")
    detail = f"{num_scored:,} tokens scored in {num_checked} sides, {len(faults)} sides not what the policy names"
    return not faults, detail + (f", the first {faults[0]}" if faults else "")


def _num_shared_replies(case: Case, row: dict) -> int:
    """Replies that train among the messages with which both sides begin, except each side's last message."""
    shared = []
    for one, other in zip(*(clean_messages(side)[:-1] for side in conversations(row)), strict=False):
        if one != other:
            break
        shared.append(one)
    if not any(message["role"] == "assistant" for message in shared):
        return 0
    whole = _derived(case, row, shared)
    return len(runs(whole.is_reply)) if whole is not None else 0


def sides_differ(case: Case) -> tuple[bool, str]:
    """The sides of each sampled pair render to different texts."""
    sample = case.need("sample", "rows")
    equal = [row.where for row, (one, other) in zip(sample, case.ids, strict=True) if one == other]
    detail = f"{len(equal)} of {len(sample)} sampled pairs have two sides that render to the same text"
    return not equal, detail + (f": {', '.join(equal[:3])}" if equal else "")


# ---------------------------------------------------------------- completions


def completion_mask_is_policy(case: Case) -> tuple[bool, str]:
    """Prompt and completion begin the row's own conversation, and what trains are the replies after the prompt."""
    _check_policy(case)
    _check_earlier(case)
    check_tags(case.config, case.trainable, case.tokenizer, set())
    faults, num_trained, num_checked, num_left = [], 0, 0, 0
    for prepared in case.arrays:
        row = case.fitting[prepared["rows"][0]]
        sides = conversations(row)
        whole = _derived(case, row, sides[-1] if "label" in prepared and not prepared["label"][0] else sides[0])
        if whole is None:
            num_left += 1
            continue
        num_checked += 1
        ids = np.concatenate((prepared["prompt_ids"], prepared["completion_ids"]))
        start, stop = len(prepared["prompt_ids"]), len(ids)
        mask = prepared["completion_mask"] == 1
        num_trained += int(mask.sum())
        if not np.array_equal(ids, whole.ids[:stop]):
            faults.append(f"{row.where}: {difference(case.decode(whole.ids), case.decode(ids))}")
        elif not np.array_equal(mask, whole.is_reply[start:stop]):
            found, expected = (_texts_of(case, ids[start:], flags) for flags in (mask, whole.is_reply[start:stop]))
            faults.append(f"{row.where}: {difference(''.join(expected), ''.join(found))}")
    if num_left and not num_checked:
        raise NotChecked(f"the template rewrites earlier turns in all {num_left} completions, see template")
    detail = f"{num_trained:,} tokens train in {num_checked} completions, {len(faults)} not what the policy names"
    return not faults, detail + (f", the first {faults[0]}" if faults else "")


# ---------------------------------------------------------------- the model


def packed_equals_unpacked(case: Case) -> tuple[bool, str]:
    """A packed row gives the loss and gradients of its documents one by one."""
    from smolpost.doctor import training_steps

    return training_steps.packed_equals_unpacked(case.model_to_run(), case.short_documents(), case.environment)


def pair_equals_two_sequences(case: Case) -> tuple[bool, str]:
    """A pair in one sequence gives the log-probabilities of its two sequences."""
    from smolpost.doctor import training_steps

    rows = case.short_pairs.with_format("numpy")
    return training_steps.pair_equals_two_sequences(case.model_to_run(), [*rows], case.environment)


def accumulation(case: Case) -> tuple[bool, str]:
    """Several forward passes give the loss and gradients of one."""
    from smolpost.doctor import training_steps

    for other in ("packing", "pairs"):
        if other in case.failed:
            raise NotChecked(f"forward passes of several rows cannot be compared, see {other}")
    if case.config.layout == "pairs":
        return training_steps.apo_accumulation(case.need("pair_steps", "reference loss"), case.environment)
    return training_steps.sft_accumulation(
        case.config, case.model_to_run(), case.tokenizer, case.short_documents(), case.environment, case.folder
    )


def loss_at_reference(case: Case) -> tuple[bool, str]:
    """The first loss is the one that theory gives when the policy equals the reference."""
    from smolpost.doctor import training_steps

    return training_steps.loss_at_reference(case.config, case.pair_steps, case.environment)


def vocabulary(case: Case) -> tuple[bool, str]:
    """Every id of the sample has an embedding of its own."""
    from smolpost.doctor import training_steps

    case.need("sample", "rows")
    ids = np.concatenate([np.array(ids) for sides in case.ids for ids in sides])
    return training_steps.vocabulary(case.model, case.tokenizer, ids)
