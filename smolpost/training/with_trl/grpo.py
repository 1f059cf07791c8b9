"""Reinforcement learning by TRL's GRPOTrainer: several sampled replies to a prompt, each rewarded beside the others.

Every optimizer step samples its own replies with transformers' `generate`, so a checkpoint has nothing but weights,
moments and random numbers to keep, and no reply is older than the weights that learn from it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import GRPOConfig, GRPOTrainer

from smolpost.chat.answers import opens_thinking
from smolpost.data.dataset_folder import list_lengths
from smolpost.errors import UserError
from smolpost.inference.generation import reply_text, stop_token_ids
from smolpost.training import rewards, sft
from smolpost.training.environment import Environment
from smolpost.training.settings import PolicyTraining
from smolpost.training.with_trl.engine import arguments_of, batches_of, built
from smolpost.training.with_trl.rollouts import EachStepRepeated, Samples, check_room, check_whole_steps

reference = sft.reference  # TRL loads the start again where `beta` asks for it


class GRPO(Samples, GRPOTrainer):
    """TRL's trainer, run as a stage."""

    def _get_train_sampler(self, dataset=None) -> EachStepRepeated:
        return EachStepRepeated(self.batches, self.args.gradient_accumulation_steps, self.num_generations)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        for name in [name for name in self._metrics["train"] if name.startswith("clip_ratio/")]:
            del self._metrics["train"][name]  # always 0, as every step's replies are its own weights'
        super().log(logs, start_time)

    def _tokenize_prompts(self, prompts: list[list[int]]) -> tuple[list[list[int]], None, dict]:
        return prompts, None, {}  # token ids already

    def _calculate_rewards(self, rows, prompts, completions, completion_ids) -> torch.Tensor:
        rewards = super()._calculate_rewards(rows, prompts, completions, completion_ids)
        first = self.args.process_index * len(rows)  # those of all ranks come back
        self.samples = [
            {
                "prompt": prompt,
                "completion": ids,
                "reference": row["reference"],
                "rewards": dict(zip(self.reward_func_names, values, strict=True)),
                "ended_by": self.ended_by(ids),
            }
            for row, prompt, ids, values in zip(
                rows, prompts, completion_ids, rewards[first : first + len(rows)].tolist(), strict=True
            )
        ]
        return rewards


def check(name: str, stage: PolicyTraining, rows: Dataset, environment: Environment) -> None:
    replies = stage.num_generations * stage.global_batch_size
    at_once = stage.micro_batch_size * environment.world_size
    if replies % at_once:
        raise UserError(
            f"stages.{name}: {replies} replies per step (global_batch_size={stage.global_batch_size} prompts with "
            f"num_generations={stage.num_generations}) are not a multiple of {at_once}, those that micro_batch_size="
            f"{stage.micro_batch_size} on {environment.world_size} ranks take at once; change one of them"
        )
    check_whole_steps(name, stage, len(rows))
    check_room(name, stage, int(list_lengths(rows, "prompt_ids").max()))


def arguments(
    stage: PolicyTraining, seed: int, num_rows: int, out: Path, environment: Environment
) -> TrainingArguments:
    return arguments_of(
        GRPOConfig,
        stage,
        stage.micro_batch_size,
        seed,
        num_rows,
        out,
        environment,
        replies=stage.num_generations,
        num_generations=stage.num_generations,
        max_completion_length=stage.max_new_tokens,
        temperature=stage.temperature,
        top_p=stage.top_p,
        top_k=stage.top_k,
        loss_type=stage.loss,
        scale_rewards=stage.scale_rewards,
        reward_weights=list(stage.rewards.values()),
        beta=stage.beta,
    )


def trainer(
    stage: PolicyTraining,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Dataset,
    reference: None,
    arguments: TrainingArguments,
    seed: int,
    environment: Environment,
) -> GRPO:
    stops = stop_token_ids(model.generation_config)

    def asked(found: dict[str, list]) -> dict[str, list]:
        """Rows in TRL's columns; what is not the prompt goes to the rewards."""
        return {
            "prompt": found["prompt_ids"],
            "reference": [reply_text(tokenizer, ids, stops) for ids in found["completion_ids"]],
            "opened": [opens_thinking(tokenizer, ids) for ids in found["prompt_ids"]],
        }

    return built(
        GRPO,
        model,
        tokenizer,
        batches_of(list_lengths(rows, "prompt_ids"), stage, seed, environment),
        kept=stage.kept_samples,
        args=arguments,
        train_dataset=rows.select_columns(["prompt_ids", "completion_ids"]).with_transform(asked),
        reward_funcs=[_function_of(name, stage, tokenizer, stops) for name in stage.rewards],
    )


def _function_of(
    name: str, stage: PolicyTraining, tokenizer: PreTrainedTokenizerBase, stops: list[int]
) -> Callable[..., list[float | None]]:
    """A reward as TRL calls it, under its own name."""
    reward = rewards.configured(name, stage.reward_settings.get(name, {}))

    def function(completion_ids: list[list[int]], reference: list[str], opened: list[bool], **_: object):
        return [
            reward.value(
                rewards.Rollout(
                    reply=reply_text(tokenizer, ids, stops),
                    reference=right,
                    opened=in_prompt,
                    num_tokens=len(ids),
                    max_tokens=stage.max_new_tokens,
                    stopped=bool(ids) and ids[-1] in stops,
                )
            )
            for ids, right, in_prompt in zip(completion_ids, reference, opened, strict=True)
        ]

    function.__name__ = name
    return function
