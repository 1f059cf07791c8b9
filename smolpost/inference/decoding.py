"""Decoding without the host: one step of a model as a CUDA graph that is replayed for every token.

Token by token, a GPU waits for Python: a small model's step is hundreds of kernels that run shorter than their launches
take. So all that changes from step to step lies in tensors on the device, and the host only replays the step.

The cache is made for the longest row, but a step reads no more of it than the part in use, rounded up to WINDOW tokens;
each such part has a graph of its own.

Shapes: B rows, L tokens of the longest prompt, S tokens the cache has room for, W <= S tokens that a step reads,
V vocabulary.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache, partial

import torch
from transformers import DynamicCache, GenerationMixin, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache, StaticLayer

from smolpost.inference.sampling import NotFinite, Sampling, exponentials, truncated
from smolpost.model.stored import one_line

WINDOW = 256
# Longer rows need many graphs, and most of their time goes to attention, which no graph makes faster.
MAX_TOKENS = 16384
# Replays between looks at whether all rows are finished; the host waits for the device at each.
STEPS_PER_LOOK = 16
# Of a reply that is read as it comes: often enough for an eye, rarely enough for the device.
STEPS_PER_GLANCE = 4
# A capture costs about as much as three steps without a graph, so it has to be used for more of them.
FEWEST_REPLAYS = 8
# Attention functions that take a boolean mask [B, 1, L, S] as it is.
ATTENTION = ("sdpa", "packed")

# Turns a step into a call that repeats it.
Capture = Callable[[Callable[[], None]], Callable[[], object]]


class Decoder:
    """Replies to batches of B prompts; its buffers and graphs serve all of them.

    The tokens are those of transformers' `generate` with the same seed, which draws the same random numbers in the same
    order. Only rounding may differ, as attention runs over another number of keys.

    Args:
        model: As `fits` accepts it, in evaluation mode.
        num_rows: B.
        num_tokens: Longest prompt and its longest reply together; S is this, rounded up to WINDOW.
        sampling: Without penalties.
        eos_token_ids, pad_token_id: As for `generate`.
        capture: None repeats each step eagerly.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        num_rows: int,
        num_tokens: int,
        *,
        sampling: Sampling,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        capture: Capture | None,
    ):
        self.model, self.pad_token_id, self.capture = model, pad_token_id, capture
        device, size = model.device, _round_up(num_tokens)
        self.sampling = sampling
        self.seeds: torch.Tensor | None = None  # [B], where each row has its own
        self.generator = torch.Generator(device)
        self.noise: torch.Tensor | None = None  # [B, V], where tokens are sampled
        self.stop_tokens = torch.tensor(list(eos_token_ids), dtype=torch.long, device=device)
        # Where the newest token of each row lies, in the cache as in `tokens`.
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.tokens = torch.zeros(num_rows, size, dtype=torch.long, device=device)
        self.newest = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.position_ids = torch.zeros(num_rows, 1, dtype=torch.long, device=device)
        self.visible = torch.zeros(num_rows, 1, 1, size, dtype=torch.bool, device=device)
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.has_nan = torch.zeros((), dtype=torch.bool, device=device)
        num_layers = len(StaticCache(model.config, size).layers)
        self.cache = Cache(layers=[_WindowLayer(size, self.column) for _ in range(num_layers)])
        self.replays: dict[int, Callable[[], object]] = {}  # by W

    def reply(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        max_new_tokens: int,
        seed: int | torch.Tensor,
        check: Callable[[], object] | None = None,
        stream: Callable[[list[int]], object] | None = None,
    ) -> list[list[int]]:
        """Reply to B prompts.

        Args:
            input_ids: [B, L], padded on the left; L + max_new_tokens <= S.
            attention_mask: [B, L], 1 on tokens and 0 on padding.
            max_new_tokens: Longest reply, > 0.
            seed: Decides the random numbers; [B] int64: those of each row, as `RowSampling` draws them.
            check: Called now and then; what it raises ends the batch.
            stream: Called now and then with the new tokens of the first reply, and at the end with the rest.
        Returns:
            B lists of as many tokens: a reply up to its stop token, then the padding token or anything.
        Raises:
            NotFinite: A probability is NaN.
        """
        length = input_ids.shape[1]
        end = length + max_new_tokens
        self.seeds = seed if isinstance(seed, torch.Tensor) else None
        if self.seeds is None:
            self.generator.manual_seed(seed)
        self._prefill(input_ids, attention_mask)
        given = length  # columns before it were streamed
        for column in range(length, end - 1):
            window = _round_up(column + 1)
            replay = self.replays.get(window)
            if (replay is None or column % STEPS_PER_LOOK == 0) and self.finished.all():
                end = column + 1
                break
            if check is not None and column % STEPS_PER_LOOK == 0:
                check()
            if stream is not None and column % STEPS_PER_GLANCE == 0:
                stream(self.tokens[0, given : column + 1].tolist())
                given = column + 1
            self._draw(column + 1 - length)
            if replay is not None:
                replay()
                continue
            step = partial(self._step, window)
            step()  # its kernels have to be loaded before a capture
            if self.capture is not None and min(window, end - 1) - column > FEWEST_REPLAYS:
                self._capture(window, step)
        if self.has_nan:
            raise NotFinite()
        if stream is not None:
            stream(self.tokens[0, given:end].tolist())
        return self.tokens[:, length:end].tolist()

    def _prefill(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> None:
        """Run the prompts with a cache of their own length, as `generate` does, and take its contents over."""
        length = input_ids.shape[1]
        positions = (attention_mask.cumsum(-1) - 1).masked_fill(attention_mask == 0, 0)
        prompts = DynamicCache(config=self.model.config)
        logits = self._forward(input_ids, attention_mask, positions, prompts)
        for layer, prompt in zip(self.cache.layers, prompts.layers, strict=True):
            layer.fill(prompt.keys, prompt.values)
        self.visible[..., :length] = attention_mask[:, None, None].bool()
        self.visible[..., length:] = False
        self.position_ids.copy_(positions[:, -1:] + 1)
        self.column.fill_(length)
        self.finished.fill_(False)
        self.has_nan.fill_(False)
        if self.sampling.temperature > 0 and self.noise is None:
            self.noise = torch.empty_like(logits, dtype=torch.float32)
        self._draw(0)
        self._choose(logits)

    def _draw(self, step: int) -> None:
        """The random numbers of the next token, before which a reply has `step` tokens.

        They are drawn outside the graph. A capture that fails may leave every generator used inside it unusable.
        """
        if self.noise is None:
            return
        if self.seeds is not None:
            self.noise.copy_(exponentials(self.seeds, step, self.noise.shape[1]))
        else:
            self.noise.exponential_(1, generator=self.generator)

    def _step(self, window: int) -> None:
        """Feed the newest tokens and choose the next, without asking the device anything."""
        self.visible.index_fill_(3, self.column, True)
        for layer in self.cache.layers:
            layer.window = window
        logits = self._forward(self.newest, self.visible[..., :window], self.position_ids, self.cache)
        self.column += 1
        self.position_ids += 1
        self._choose(logits)

    def _forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, past: Cache
    ) -> torch.Tensor:
        """Logits [B, V] after the last of the tokens given."""
        return self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        ).logits[:, -1]

    def _choose(self, logits: torch.Tensor) -> None:
        """Choose the next tokens from logits [B, V] and put them where the next step finds them."""
        scores = logits.float()
        if self.noise is not None:
            scores = truncated(scores / self.sampling.temperature, self.sampling)
            # What torch.multinomial does for one sample, less its checks, which wait for the device.
            scores = scores.softmax(dim=-1)
            self.has_nan |= scores.isnan().any()
            scores = scores / self.noise
        chosen = scores.argmax(dim=-1).masked_fill(self.finished, self.pad_token_id)[:, None]
        self.finished |= (chosen == self.stop_tokens).any(dim=-1)
        self.newest.copy_(chosen)
        self.tokens.index_copy_(1, self.column, chosen)

    def _capture(self, window: int, step: Callable[[], None]) -> None:
        """Keep a graph of the step; where a model cannot be captured, say so and go on without."""
        try:
            self.replays[window] = self.capture(step)
        except RuntimeError as error:
            self.capture = None
            _say_once(f"{type(self.model).__name__} generates without CUDA graphs, which is slower: {one_line(error)}")


class _WindowLayer(StaticLayer):
    """Keys and values of a layer, S tokens of which a step reads the first `window`.

    Args:
        column: [1], where the step's keys and values go.
    """

    def __init__(self, max_cache_len: int, column: torch.Tensor):
        super().__init__(max_cache_len)
        self.column, self.window = column, max_cache_len

    def fill(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Take over keys and values [B, K, L, D] of prompts."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        self.keys[:, :, : keys.shape[2]] = keys
        self.values[:, :, : values.shape[2]] = values

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs):
        """[B, K, 1, D] each -> all that the step reads, [B, K, W, D] each."""
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys[:, :, : self.window], self.values[:, :, : self.window]


def fits(model: PreTrainedModel, num_rows: int, num_tokens: int) -> bool:
    """Whether a Decoder may take this model and batch; `generate` has to take the others.

    It may where all layers cache all tokens, the model is told positions and masks as most are, and the cache needs at
    most half of the GPU's free memory: `generate` needs less where replies stop early.
    """
    # Under autocast a graph would keep its own copies of the weights.
    if model.device.type != "cuda" or torch.is_autocast_enabled("cuda") or num_tokens > MAX_TOKENS:
        return False
    if not supports(model):
        return False
    unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
    free = torch.cuda.mem_get_info(model.device)[0] + unused
    return cache_bytes(model, num_rows, num_tokens) <= free / 2


def cache_bytes(model: PreTrainedModel, num_rows: int, num_tokens: int) -> int:
    """Bytes of a Decoder's keys and values."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    per_token = 2 * config.num_hidden_layers * key_heads * head_size * model.dtype.itemsize
    return num_rows * _round_up(num_tokens) * per_token


def supports(model: PreTrainedModel) -> bool:
    """Whether the model's step can be written as a Decoder does, on any device."""
    arguments = inspect.signature(model.forward).parameters
    return (
        model._can_compile_fullgraph
        and model.config._attn_implementation in ATTENTION
        and {"position_ids", "attention_mask", "past_key_values", "logits_to_keep"} <= arguments.keys()
        and not model.config.is_encoder_decoder
        # Models with inputs or masks of their own prepare them in one of these.
        and type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
        and not hasattr(model, "create_masks_for_generate")
        and all(type(layer) is StaticLayer for layer in StaticCache(model.config, 1).layers)
        and len({parameter.device for parameter in model.parameters()}) == 1
    )


def cuda_graphs() -> Capture:
    """Capture of steps whose graphs share their memory: they run one after another and keep nothing in it."""
    pool = torch.cuda.graph_pool_handle()

    def capture(step: Callable[[], None]) -> Callable[[], object]:
        graph = torch.cuda.CUDAGraph()
        # Other threads, which load data or write checkpoints, may go on meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            step()
        return graph.replay

    return capture


def _round_up(num_tokens: int) -> int:
    return -(-num_tokens // WINDOW) * WINDOW


@cache
def _say_once(line: str) -> None:
    print(line, flush=True)
