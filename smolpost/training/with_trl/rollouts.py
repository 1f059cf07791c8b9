"""What TRL's trainers that sample replies share: the order of prompts, and the replies that are kept to be read."""

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object

from smolpost.errors import UserError
from smolpost.files import write_text
from smolpost.training.arguments import total_steps
from smolpost.training.batches import GlobalBatches
from smolpost.training.settings import Training
from smolpost.training.with_trl.engine import FromTRL, InOrder

FOLDER = "samples"  # subfolder of the stage's folder: a file for each logged step


class Samples(FromTRL):
    """A mixin before a trainer that samples replies; it keeps those of the logged steps.

    Args:
        kept: Replies written for each logged step.

    Attributes:
        samples: Of this rank in the current step: prompt and completion as token ids, and what else a reader wants.
    """

    SAMPLES = True

    def __init__(self, *, kept: int, **settings: Any):
        super().__init__(**settings)
        self.kept = kept
        self.samples: list[dict] = []

    def _generate_single_turn(self, *args, **kwargs):
        with warnings.catch_warnings():
            # TRL switches gradient checkpointing off and on under names that transformers is about to drop.
            warnings.filterwarnings("ignore", "`gradient_checkpointing_", FutureWarning)
            return super()._generate_single_turn(*args, **kwargs)

    def _count_tokens(self) -> None:
        """These trainers of TRL count in the state itself."""

    def ended_by(self, completion: list[int]) -> str:
        return "stop token" if completion[-1] in self.eos_token_ids else "max_new_tokens"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.kept:
            self._keep_samples()
        super().log(logs, start_time)

    def _keep_samples(self) -> None:
        """Write the step's sampled replies, as text with all control tokens; all ranks call."""
        samples = gather_object(self.samples[: self.kept])[: self.kept]
        if not samples or not self.is_world_process_zero():
            return
        lines = []
        for sample in samples:
            texts = {side: self.processing_class.decode(sample[side]) for side in ("prompt", "completion")}
            line = sample | texts | {"num_tokens": len(sample["completion"])}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        folder = Path(self.args.output_dir) / FOLDER
        folder.mkdir(exist_ok=True)
        write_text(folder / f"step-{self.state.global_step:06d}.jsonl", "".join(lines))


class EachStepRepeated(InOrder):
    """Each optimizer step's rows, once for every forward pass: TRL samples for the whole step at its first pass.

    A last step with fewer rows is left out; `check_whole_steps` refuses trainings that would come to it.

    Args:
        num_passes: Forward passes of a step on each rank.
        num_replies: Sampled to each row, which then comes as often, in a row.
    """

    def __init__(self, batches: GlobalBatches, num_passes: int, num_replies: int = 1):
        super().__init__(batches)
        self.num_passes, self.num_replies = num_passes, num_replies

    def __len__(self) -> int:
        size = self.batches.global_batch_size
        return len(self.batches.lengths) // size * size * self.num_replies * self.num_passes

    def __iter__(self) -> Iterator[int]:
        order, size = list(super().__iter__()), self.batches.global_batch_size
        for first in range(0, len(order) - size + 1, size):
            rows = [row for row in order[first : first + size] for _ in range(self.num_replies)]
            yield from rows * self.num_passes


def check_whole_steps(name: str, stage: Training, num_rows: int) -> None:
    """Refuse a last step of an epoch with fewer rows, which TRL's trainers that sample would leave out.

    Raises:
        UserError: With the remedy.
    """
    where, size = f"stages.{name}", stage.global_batch_size
    steps, left = divmod(num_rows, size)
    if left and total_steps(stage, num_rows) > steps:
        shorter = f"stop before with {where}.max_steps={steps}, or set " if steps else "set "
        raise UserError(
            f"{where}: {num_rows} rows leave {left} for the last step of an epoch, which TRL's trainer leaves out; "
            f"{shorter}{where}.global_batch_size to a divisor of {num_rows}"
        )


def check_room(name: str, stage: Training, longest: int) -> None:
    """Refuse prompts that leave no room for a reply.

    Args:
        longest: Tokens of the longest prompt.
    Raises:
        UserError: With the remedy.
    """
    where, needed = f"stages.{name}", longest + stage.max_new_tokens
    if needed > stage.max_seq_len:
        raise UserError(
            f"{where}.max_seq_len={stage.max_seq_len}, but the longest prompt has {longest} tokens and a sampled reply "
            f"up to {where}.max_new_tokens={stage.max_new_tokens}; set it to {needed} or more, or lower max_new_tokens"
        )
