"""What every engine can be asked: replies to prompts, and log-probabilities of given tokens."""

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Reply(NamedTuple):
    """What the model answered.

    Attributes:
        text: Without the stop token; think and tool tags stay.
        num_tokens: The stop token included.
        cut: It reached the longest reply's length without a stop token.
    """

    text: str
    num_tokens: int
    cut: bool


class Engine(Protocol):
    tokenizer: "PreTrainedTokenizerBase"

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
        """`num_samples` replies to each prompt (token ids, as one batch); greedy at temperature 0."""

    def logps(self, sequences: list[tuple[list[int], list[int]]]) -> list[list[float]]:
        """Log-probabilities, as one batch.

        Args:
            sequences: Token ids, and the places in them that are scored, ascending, each >= 1.
        Returns:
            For each sequence the log-probability, in nats, of the token at each place after all tokens before it.
        """
