"""Whether a stage's written model is the trained one: both score the same tokens before the stage is finished."""

from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import PreTrainedModel, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from smolpost.errors import UserError
from smolpost.model.loading import load_model
from smolpost.training.environment import Environment

NUM_TOKENS = 256
# Largest difference of the two losses, relative to the trained one's, or in nats where that is below 1. In bf16 the
# backends round at different places: complete models (ZeRO, FSDP) or inputs of products; adapters apart or merged.
LIMITS = {"fp32": 1e-4, "bf16": 1e-2}
SPARE = 1.2  # times the weights' size must be free on the accelerator to load the written model there


def probe(rows: Dataset) -> torch.Tensor:
    """[1, L] tokens from the beginning of the prepared rows; whatever they are, both models must score them alike."""
    columns = [
        name for name in ("input_ids", "prompt_ids", "chosen_ids", "completion_ids") if name in rows.column_names
    ]
    found: list[int] = []
    for row in rows:
        found += [token for name in columns for token in row[name]]
        if len(found) >= NUM_TOKENS:
            break
    return torch.tensor([found[:NUM_TOKENS]])


@torch.no_grad()
def loss_on(model: PreTrainedModel, tokens: torch.Tensor) -> float:
    """Mean negative log-likelihood per token, in nats, by the ordinary forward pass of the model.

    Args:
        model: The trained one in whatever it is wrapped (all ranks call), or the written one.
        tokens: [1, L] on the model's device.
    """
    training = model.training
    model.eval()
    logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    model.train(training)
    return torch.nn.functional.cross_entropy(logits, tokens[0, 1:]).item()


def check_written(
    name: str,
    out: Path,
    tokens: torch.Tensor,
    trained_loss: float,
    trainer: Trainer,
    environment: Environment,
    attn_implementation: str,
) -> dict[str, float]:
    """Reload the model that rank 0 wrote, score the tokens again and compare; all ranks call.

    Returns:
        For the report: `trained_loss`, `written_loss`, `num_tokens`; of rank 0.
    Raises:
        UserError: The trained model's loss is not finite, the written model does not load whole, or its loss is
            another. All ranks raise.
    """
    found, problem = {}, [None]
    if trainer.is_world_process_zero():
        precision = "bf16" if environment.bf16 else "fp32"
        try:
            written_loss = _written_loss(out, tokens, environment, attn_implementation)
            _compare(name, out, trained_loss, written_loss, precision)
            found = {"trained_loss": trained_loss, "written_loss": written_loss, "num_tokens": tokens.numel()}
        except UserError as error:
            problem = [str(error)]
    broadcast_object_list(problem)
    if problem[0]:
        raise UserError(problem[0])
    return found


def _written_loss(out: Path, tokens: torch.Tensor, environment: Environment, attn_implementation: str) -> float:
    unset_hf_deepspeed_config()  # only this rank loads: nothing to shard, and training is over
    model = load_model(out, who="the written model", dtype=torch.float32, attn_implementation=attn_implementation)
    device = environment.device
    if not environment.use_cpu:
        torch.accelerator.empty_cache()
        free, _ = torch.accelerator.get_memory_info(device)
        # The accelerator may have no space for a second model; a CPU takes seconds for so few tokens.
        if free < SPARE * sum(parameter.nbytes for parameter in model.parameters()):
            device = torch.device("cpu")
    autocast = environment.bf16 and device == environment.device
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
        return loss_on(model.to(device), tokens.to(device))


def _compare(name: str, out: Path, trained_loss: float, written_loss: float, precision: str) -> None:
    if not torch.isfinite(torch.tensor(trained_loss)):
        raise UserError(
            f"stages.{name}: the trained model's loss is {trained_loss}: training diverged; lower "
            f"stages.{name}.learning_rate or stages.{name}.max_grad_norm; the stage is not finished"
        )
    limit = LIMITS[precision] * max(1.0, trained_loss)
    if not abs(written_loss - trained_loss) <= limit:
        raise UserError(
            f"stages.{name}: the model written to {out} has a loss of {written_loss:.6g} on tokens on which the "
            f"trained one has {trained_loss:.6g} (limit of the difference: {limit:.2g} in {precision}); the stage is "
            "not finished: report this as a bug of smolpost, with the stage's settings"
        )
