"""The fields of teachers and of stages that ask them. Apart from that code, as a plan is made without torch."""

from dataclasses import dataclass, field

from smolpost.schema import MISSING, RELEASE_DAY, choice, count, number, positive, seeded, tuning

SERVERS = ("vllm", "sglang", "transformers", "llama_cpp", "hosted")


@dataclass
class Teacher:
    """A model that answers: a checkpoint of this run, in this process, or a server with OpenAI's chat API."""

    stage: str | None = None  # whose checkpoint answers in this process; `checkpoint`: model.checkpoint; null: a server
    model: str | None = None  # Hub id or path that the server serves; it must name this model
    revision: str | None = None  # of the model, for `smolpost serve` and the provenance of each row
    server: str = choice(*SERVERS)  # decides which sampling keys exist and how thinking is switched
    url: str | None = tuning(None)  # of the server's API, with its version: http://localhost:8000/v1
    api_key_env: str | None = tuning(None)  # environment variable that holds the key; keys are never in a recipe
    template: str = "smollm3"  # chat template of a stage's checkpoint; a server has its own
    thinking: bool | None = None  # true or false for all prompts; null: the mode of each row
    thinking_by: str = choice("server", "words")  # words: /think or /no_think after the question, as Qwen3 reads them
    temperature: float = number("[0, inf)", 0.6)
    top_p: float = number("(0, 1]", 0.95)
    top_k: int | None = count(None)
    min_p: float | None = number("[0, 1)", None)
    presence_penalty: float | None = number("[-2, 2]", None)
    repetition_penalty: float | None = positive(None)
    max_new_tokens: int = count(32768)  # longest reply, thinking included
    concurrency: int = tuning(256, "[1, inf)")  # requests under way at most; fewer while the server is overloaded
    request_timeout: float = tuning(1800.0, "(0, inf)")  # seconds for one try
    deadline: float = tuning(7200.0, "(0, inf)")  # seconds for one request with all its tries
    batch_size: int = tuning(32, "[1, inf)")  # prompts that a stage's checkpoint answers at once
    input_price: float | None = tuning(None, "[0, inf)")  # per million tokens, for the estimate of the cost
    output_price: float | None = tuning(None, "[0, inf)")
    # Further flags of the command that serves it, such as {tensor-parallel-size: 4}.
    serve: dict[str, str] = field(default_factory=dict, metadata={"in_key": False})


@dataclass
class Filters:
    """Which replies become rows. Each one that does not is listed with its reason."""

    finished: bool = True  # the reply ended by itself: not cut at max_new_tokens, not stopped by a content filter
    think_format: bool = True  # one closed think block with text where the teacher was to think, none where it was not
    answer: str = choice("off", "label", "keep")  # math-verify against the row's answer; label: noted, nothing removed
    language: bool = False  # the answer is in the language of the question
    min_confidence: float = number("(0, 1]", 0.5)  # of the detected language, below which a reply stays
    # Share of a reply's word 8-grams that occurred before in it; a loop at its end does not stay either.
    max_repetition: float | None = number("(0, 1]", None)
    min_tokens: int | None = count(None)  # of a reply, its reasoning included
    max_tokens: int | None = count(None)
    near: float = number("[0, 1]", 0.0)  # replies this similar to an earlier one (Jaccard, word 5-grams); 0: off
    against: list[str] = field(default_factory=list)  # evaluation files; rows that share words with them in a row
    ngram: int = count(13)  # how many words in a row count as shared


@dataclass
class Generation:
    """What all stages have that ask a teacher. Their replies lie beside the stages and outlive changes of filters."""

    filters: Filters = field(default_factory=Filters)
    today: str = RELEASE_DAY  # date rendered into prompts for a stage's checkpoint
    seed: int = seeded(0)  # from which each request takes its own
    chunk_size: int = tuning(1000, "[1, inf)")  # prompts per file of replies; fixed once a run has begun
    tasks: int = tuning(1, "[1, inf)")  # parts that several hosts can work on at once; fixed once a run has begun
    max_failed: float = tuning(0.0, "[0, 1]")  # share of the prompts that may stay without a reply
    retry_failed: bool = tuning(False)  # ask again for exactly the prompts that failed


@dataclass
class FromRows(Generation):
    """What the stages have whose prompts are rows."""

    prompts: str = MISSING  # mixture name; each row is a prompt
