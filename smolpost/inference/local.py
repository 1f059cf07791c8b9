"""A model in this process that answers prompts and scores tokens.

Shapes: B sequences, L tokens of the longest one, T scored tokens, H hidden.
"""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smolpost.chat.turn_end import endless_replies
from smolpost.errors import UserError
from smolpost.inference.engine import Reply
from smolpost.inference.generation import generate, inference, padding_token_id, reply_text, stop_token_ids
from smolpost.model.positions import learned_positions
from smolpost.objectives.head import decoder_of, head_of
from smolpost.objectives.logprobs import token_scores


class LocalEngine:
    """A causal LM of transformers, on the device where it lies.

    Replies end where its own generation config says, as they do for its users. Where that is not the end of a turn in
    its chat template, a line says so.

    Raises:
        UserError: A weight is NaN or infinite: the model would reply with nonsense and be scored for it.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.stop_tokens = stop_token_ids(model.generation_config)
        if line := endless_replies(tokenizer, self.stop_tokens, model.name_or_path or "the evaluated model"):
            print(line, flush=True)
        check_weights(model, "the evaluated model")

    def generate(
        self,
        prompts: list[list[int]],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        num_samples: int = 1,
        seed: int = 0,
    ) -> list[list[Reply]]:
        check_length(self.model, max(map(len, prompts)) + max_new_tokens, "prompt and reply")
        repeated = [prompt for prompt in prompts for _ in range(num_samples)]
        replies = generate(
            self.model,
            repeated,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            eos_token_ids=self.stop_tokens,
            pad_token_id=padding_token_id(self.tokenizer),
            batch_size=len(repeated),
        )
        texts = [reply_text(self.tokenizer, reply, self.stop_tokens) for reply in replies]
        answers = [Reply(text, len(r), r[-1] not in self.stop_tokens) for text, r in zip(texts, replies, strict=True)]
        return [answers[i : i + num_samples] for i in range(0, len(answers), num_samples)]

    def logps(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        longest = max(len(ids) for ids, _ in sequences)
        check_length(self.model, longest, "row")
        padding = padding_token_id(self.tokenizer)
        input_ids = [ids + [padding] * (longest - len(ids)) for ids, _ in sequences]
        input_ids = torch.tensor(input_ids, device=self.model.device)  # [B, L]
        rows = [row for row, (_, places) in enumerate(sequences) for _ in places]  # [T]
        columns = [place for _, places in sequences for place in places]  # [T]
        rows, columns = (torch.tensor(index, device=self.model.device, dtype=torch.long) for index in (rows, columns))
        with inference(self.model):
            # Padding is on the right, where causality hides it from every real token: no mask needed.
            hidden = decoder_of(self.model)(input_ids=input_ids, use_cache=False).last_hidden_state  # [B, L, H]
            scores = token_scores(
                hidden[rows, columns - 1], input_ids[rows, columns], head_of(self.model), metrics=False
            )
        if not scores.logps.isfinite().all():
            raise UserError(
                "a log-probability of the evaluated model is NaN or infinite: its activations are not finite; train "
                "it again with a lower learning_rate"
            )
        logps = iter(scores.logps.tolist())
        return [[next(logps) for _ in places] for _, places in sequences]


def check_weights(model: PreTrainedModel, who: str) -> None:
    """
    Args:
        who: The model in the message.
    Raises:
        UserError: A weight is NaN or infinite.
    """
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise UserError(f"{who}'s {name} holds NaN or infinite numbers; train it again with a lower learning_rate")


def check_length(model: PreTrainedModel, num_tokens: int, what: str) -> None:
    """
    Raises:
        UserError: There are more tokens than the model has position embeddings.
    """
    most = learned_positions(model.config)
    if most is not None and num_tokens > most:
        raise UserError(
            f"the longest {what} has {num_tokens} tokens, but {type(model).__name__} has a learned embedding "
            f"for each of its {most} positions; shorten what is asked, or leave the task out"
        )
