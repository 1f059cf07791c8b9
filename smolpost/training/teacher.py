"""The teacher of a distillation: another checkpoint, which scores the student's tokens."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from smolpost.chat.render import load_template
from smolpost.errors import UserError
from smolpost.model.loading import load_model
from smolpost.model.positions import learned_positions
from smolpost.model.stored import CONFIG, read_config
from smolpost.training.settings import DistillTraining
from smolpost.training.start import check_checkpoint


def check_teacher(
    name: str, stage: DistillTraining, teacher: Path, start: Path, attn_implementation: str
) -> dict[str, str]:
    """Refuse a teacher that would not load whole, or cannot score the student's tokens.

    Args:
        teacher: Its folder; `start` is the student's.
    Returns:
        What `load_model` wants to know of the names of its tensors.
    Raises:
        UserError: With the remedy.
    """
    who = f"stages.{name}.teacher={stage.teacher}"
    config, renamed = check_checkpoint(who, teacher, attn_implementation)
    if found := difference(*(AutoTokenizer.from_pretrained(folder) for folder in (teacher, start))):
        raise UserError(
            f"{who} has another tokenizer than {stage.init_from}, so it cannot score the student's tokens: {found}; "
            "take a teacher with the student's tokenizer"
        )
    sizes = [read_config(folder / CONFIG).get_text_config().vocab_size for folder in (teacher, start)]
    if sizes[0] != sizes[1]:
        raise UserError(
            f"{who} has a vocab_size of {sizes[0]:,} and {stage.init_from} one of {sizes[1]:,}, and a divergence needs "
            "the same tokens; take a teacher with as many"
        )
    most = learned_positions(config)
    if most is not None and stage.max_seq_len > most:
        raise UserError(
            f"stages.{name}.max_seq_len={stage.max_seq_len}, but {who} has a learned embedding for each of its {most} "
            f"positions; set it to {most} or less"
        )
    return renamed


def load_teacher(teacher: Path, attn_implementation: str, renamed: dict[str, str]) -> PreTrainedModel:
    """The teacher in fp32 with its own context settings; `renamed` is what `check_teacher` returned."""
    return load_model(teacher, renamed=renamed, dtype=torch.float32, attn_implementation=attn_implementation)


def template_note(name: str, stage: DistillTraining, teacher: Path) -> str:
    """A line where the teacher speaks another chat template than the stage; "" where it does not."""
    spoken = AutoTokenizer.from_pretrained(teacher).chat_template
    if spoken is None or spoken == load_template(stage.template):
        return ""
    return (
        f"stages.{name}.teacher={stage.teacher} has another chat template than stages.{name}.template="
        f"{stage.template}; it scores replies to prompts that are rendered with the stage's"
    )


def difference(teacher: PreTrainedTokenizerBase, student: PreTrainedTokenizerBase) -> str:
    """The first id that stands for another token in the two, added tokens included; "" where there is none."""
    words = [{i: word for word, i in tokenizer.get_vocab().items()} for tokenizer in (teacher, student)]
    for i in sorted(words[0].keys() | words[1].keys()):
        found = [repr(word[i]) if i in word else "no token" for word in words]
        if found[0] != found[1]:
            return f"id {i} is {found[0]} in the teacher's and {found[1]} in the student's"
    return ""
