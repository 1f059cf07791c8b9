"""The doctor's checks of rows, template and tokenizer; they need no model.

A check takes a Case and returns (passed, detail); it raises NotChecked if it does not apply.
"""

from copy import copy

import numpy as np

from smolpost.chat.masks import encode
from smolpost.chat.needed_tokens import lacking
from smolpost.chat.render import load_template, render, template_hash
from smolpost.data.prompts import mode_of
from smolpost.data.rendering import NOTES
from smolpost.doctor.stage_sample import Case, NotChecked, conversations, difference
from smolpost.errors import UserError
from smolpost.files import digest


def rows_are_valid(case: Case) -> tuple[bool, str]:
    """Every row of the sample can be read, rendered and tokenized."""
    modes = [mode_of(row) for row in case.sample]
    counts = ", ".join(f"{modes.count(mode)} {mode}" for mode in sorted(set(modes)))
    _ = case.trainable  # what tokenizing refuses counts, too
    rows = f"{case.num_scanned} rows"
    if case.num_scanned < case.num_taken:
        rows = f"the {case.num_scanned} rows looked at, of {case.num_taken:,} that the mixture takes,"
    detail = f"{len(case.refused)} of {rows} refused; sample of {len(modes)}: {counts}"
    detail += "".join(f"; {count} {NOTES[note]}" for note, count in case.notes.items())
    return not case.refused, detail + (f"; the first refused: {case.refused[0]}" if case.refused else "")


def template_round_trip(case: Case) -> tuple[bool, str]:
    """Decoded ids equal the rendered text, and a conversation's text begins with the text of its first turns."""
    unknown, texts, turns, faults = case.tokenizer.unk_token_id, 0, 0, []
    for row, sides in zip(case.need("sample", "rows"), case.ids, strict=True):
        for messages, ids in zip(conversations(row), sides, strict=False):
            text = case.render(row, messages)
            texts += 1
            if unknown not in ids and (decoded := case.decode(ids)) != text:  # unknown ones: see vocabulary
                faults.append(f"{row.where}: {difference(text, decoded)}")
            for i in range(1, len(messages)):
                if messages[i - 1]["role"] == "system":
                    continue  # a template may refuse a conversation without a question
                turns += 1
                before = case.render(row, messages[:i])
                if not text.startswith(before):
                    faults.append(f"{row.where}: messages[:{i}] alone render differently: {difference(before, text)}")
    detail = f"{texts} texts and {turns} shorter histories of them, {len(faults)} differ"
    return not faults, detail + (f"; {faults[0]}" if faults else "")


def template_tokens(case: Case) -> tuple[bool, str]:
    """The control tokens that the template writes are tokens of the tokenizer, or are known to be spelt out."""
    missing = lacking(case.tokenizer, case.template)
    if not missing:
        return True, "every control token that the template writes is one token"
    detail = f"{len(missing)} control tokens of the template are several tokens: {', '.join(missing)}"
    if case.stored_template == case.template:
        return True, f"{detail}; the template is the checkpoint's own"
    return case.config.allow_split_tokens, f"{detail}; allow_split_tokens={str(case.config.allow_split_tokens).lower()}"


def users_write_no_control_tokens(case: Case) -> tuple[bool, str]:
    """Control tokens that a user writes stay text."""
    added = case.tokenizer.added_tokens_decoder
    control = {i: token.content for i, token in added.items() if token.special or i == case.tokenizer.eos_token_id}

    def counts(question: str) -> np.ndarray:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": "ok"}]
        try:
            return np.bincount(encode(case.tokenizer, messages, **case.probe).input_ids, minlength=max(added) + 1)
        except UserError as error:
            raise NotChecked(f"the probe is refused, see mask: {error}") from error

    gained = counts(" ".join(token.content for token in added.values())) - counts("plain")
    leaked = [content for i, content in control.items() if gained[i] > 0]
    markup = sum(bool(gained[i] > 0) for i in added if i not in control)
    detail = f"{len(leaked)} of {len(control)} control tokens in a user's text become control tokens"
    detail += f" ({', '.join(leaked)})" if leaked else ""
    return not leaked, f"{detail}; {markup} of {len(added) - len(control)} other added tokens stay themselves"


def chat_parity(case: Case) -> tuple[bool, str]:
    """The previous stage's template, tokenizer and generation prompt against this stage's."""
    findings = [_same_template(case), _same_tokenizer(case), _same_generation_prompt(case)]
    return all(passed for passed, _ in findings), "; ".join(detail for _, detail in findings)


def _same_template(case: Case) -> tuple[bool, str]:
    stored, own = case.stored_template, template_hash(case.template)
    if not isinstance(stored, str):
        return True, f"template {own}, the checkpoint stores none"
    if stored == case.template:
        return True, f"template {own} as stored in the checkpoint"
    detail = f"template {own}, the checkpoint stores {template_hash(stored)}"
    texts = [(row, messages) for row in case.need("sample", "rows") for messages in conversations(row)]
    before, differing = copy(case.tokenizer), []
    before.chat_template = stored
    for row, messages in texts:
        new = case.render(row, messages)
        try:
            old = case.render(row, messages, tokenizer=before)
        except UserError as error:
            old = f"[refused: {error}]"
        if old != new:
            differing.append(f"{row.where} {difference(old, new)}")
    detail += f": {len(differing)} of {len(texts)} sampled conversations render differently"
    if differing:
        detail += f", the first {differing[0]}"
    if case.config.allow_template_change:
        return True, f"{detail}; allowed by allow_template_change"
    if _written_by_init(case, stored):
        return True, f"{detail}; nothing was trained with it"
    return not differing, detail


def _written_by_init(case: Case, stored: str) -> bool:
    """Whether the start checkpoint has random weights and the template that its own stage gave it."""
    parent = case.lineage.recipe.stages.get(case.config.init_from)
    random = parent is not None and not parent.MAKES_MODEL
    return random and load_template(parent.template) == stored


def _same_tokenizer(case: Case) -> tuple[bool, str]:
    """The start checkpoint's vocabulary against that of the checkpoint where its line began, and of prepared rows."""
    from transformers import AutoTokenizer

    stages, root = case.lineage.stages, case.config.init_from
    while root != "checkpoint" and stages[root].base and stages[root].base != "checkpoint":
        root = stages[root].base
    folders = [stages[root].folder] if root in stages else []
    folders += [case.stage.prepared / "tokenizer"]
    own, others = vocabulary_hash(case.tokenizer), []
    for folder in folders:
        if folder != case.start and (folder / "tokenizer.json").is_file():
            others.append((folder, vocabulary_hash(AutoTokenizer.from_pretrained(folder))))
    differing = [f"{folder} has {found}" for folder, found in others if found != own]
    detail = f"vocabulary {own}, compared with {len(others)} of its line"
    return not differing, ": ".join([detail, *differing])


def vocabulary_hash(tokenizer) -> str:
    """16 hex digits of the SHA-256 of tokens and ids."""
    pairs = sorted(tokenizer.get_vocab().items(), key=lambda pair: pair[1])
    return digest(pairs, digits=16)


def _same_generation_prompt(case: Case) -> tuple[bool, str]:
    """Inference and training put the same text before a reply, in both modes."""
    ask, faults, turns = {"role": "user", "content": "One or two?"}, [], 0
    for thinking, reply in ((True, "<think>\nOne.\n</think>\nOne."), (False, "One.")):
        kwargs = (case.probe["template_kwargs"] or {}) | {"enable_thinking": thinking}
        options = case.probe | {"template_kwargs": kwargs}
        messages = [ask, {"role": "assistant", "content": reply}]
        prompt = render(case.tokenizer, [ask], **options, add_generation_prompt=True)
        text = render(case.tokenizer, messages, **options)
        turns += 1
        written = "".join(text.removeprefix(prompt).split())  # a template may set other line breaks in a reply
        if not text.startswith(prompt) or not written.startswith("".join(reply.split())):
            faults.append(f"enable_thinking={thinking}: {difference(prompt + reply, text)}")
        elif not _begins(case, messages, options, prompt):
            faults.append(f"enable_thinking={thinking}: the prompt alone has other tokens than before its reply")
    for row in case.need("sample", "rows"):
        for messages in conversations(row):
            for i, message in enumerate(messages):
                if message["role"] != "assistant" or not i:
                    continue
                turns += 1
                prompt = case.render(row, messages[:i], add_generation_prompt=True)
                text = case.render(row, messages[: i + 1])
                if not text.startswith(prompt):
                    faults.append(f"{row.where}: {difference(prompt, text)}")
    detail = f"generation prompt before {turns - len(faults)} of {turns} replies"
    return not faults, detail + (f"; {faults[0]}" if faults else "")


def _begins(case: Case, messages: list[dict], options: dict, prompt: str) -> bool:
    """Whether the training tokens of prompt and reply begin with the inference tokens of the prompt."""
    ids = case.tokenizer.encode(prompt, add_special_tokens=False)
    try:
        return encode(case.tokenizer, messages, **options).input_ids[: len(ids)] == ids
    except UserError:  # refused, see mask
        return True


def lengths(case: Case) -> tuple[bool, str]:
    """The rows fit max_seq_len, and max_seq_len fits the model's context."""
    from smolpost.model.stored import CONFIG, read_config

    found, limit = case.need("lengths", "rows"), case.config.max_seq_len
    num_over = int((found > limit).sum())
    context = case.config.max_position_embeddings or read_config(case.start / CONFIG).max_position_embeddings
    detail = (
        f"{num_over} of {len(found)} sampled rows ({num_over / len(found):.0%}) above max_seq_len={limit:,}, longest "
        f"{found.max():,} tokens; overlong={case.config.overlong}; the model's context is {context:,}"
    )
    lost = {"refuse": num_over > 0, "drop": num_over == len(found)}.get(case.config.overlong, False)
    return min(limit, found.max()) <= context and not lost, detail
