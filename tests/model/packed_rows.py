"""Small models and packed rows of documents and pairs, with what they give: logits, losses and gradients."""

from functools import partial

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.model.attention_kernels import varlen_attention
from smolpost.model.varlen_kernels import VarlenKernel

VOCAB = 40
SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
)  # fmt: skip
# Prompt, chosen, rejected: ordinary, without prompt, chosen or rejected, and of single tokens.
PAIRS = [(5, 4, 6), (0, 3, 2), (4, 0, 3), (3, 2, 0), (1, 1, 1)]


def build(attn: str, model=SmolLM3ForCausalLM, config=SmolLM3Config, **changes):
    """A model with weights large enough for attention to matter, the same for every `attn`."""
    torch.manual_seed(0)
    model = model._from_config(config(**{**SIZES, **changes}), attn_implementation=attn)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance=1e-5):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, atol=tolerance, rtol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def document_positions(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths])[None]


def pair_positions(pairs) -> torch.Tensor:
    spans = [(torch.arange(p + c), torch.arange(p, p + r)) for p, c, r in pairs]
    return torch.cat([span for pair in spans for span in pair])[None]


def step(model, lengths: list[int], **kwargs):
    """Logits and gradients of one packed row of documents."""
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (1, sum(lengths)))
    output = model(input_ids=ids, position_ids=document_positions(lengths), labels=ids, use_cache=False, **kwargs)
    output.loss.backward()
    return {"logits": output.logits.detach(), **gradients(model)}


def score(prompt_logits, logits, ids):
    """Summed log-probability of a completion's ids, the first of which the prompt's last token predicts."""
    predictions = torch.cat((prompt_logits[-1:], logits))[:-1]
    return -F.cross_entropy(predictions, ids[len(ids) - len(predictions) :], reduction="sum")


def pair_step(model, pairs, packed: bool):
    """Logits, loss and gradients of pairs, in one packed row or as two sequences each; sides count unequally."""
    torch.manual_seed(1)
    totals = [sum(pair) for pair in pairs]
    ids = torch.randint(3, VOCAB, (sum(totals),))
    if packed:
        row = model(input_ids=ids[None], position_ids=pair_positions(pairs), pair_lengths=pairs, use_cache=False).logits
        rows = row[0].split(totals)
    loss, logits = torch.zeros(()), []
    for i, (part, lengths) in enumerate(zip(ids.split(totals), pairs, strict=True)):
        prompt, chosen, rejected = part.split(lengths)
        if packed:
            first, *sides = rows[i].split(lengths)
            prompts = first, first
        else:
            both = [alone(model, torch.cat((prompt, side))).tensor_split([len(prompt)]) for side in (chosen, rejected)]
            prompts, sides = zip(*both, strict=True)
        loss = loss - score(prompts[0], sides[0], chosen) + 0.5 * score(prompts[1], sides[1], rejected)
        logits += [*prompts, *sides]
    loss.backward()
    return {"loss": loss.detach(), "logits": torch.cat(logits).detach(), **gradients(model)}


def alone(model, ids):
    """Logits [n, V] of one sequence [n]; n may be 0."""
    return model(input_ids=ids[None], use_cache=False).logits[0] if len(ids) else torch.empty(0, VOCAB)


def inputs(num_tokens, heads=4, key_heads=2, size=8, dtype=torch.float32):
    """Query, key and value with the strides that a model gives them, tokens before heads."""
    torch.manual_seed(2)
    row = [torch.randn(1, num_tokens, n, size, dtype=dtype) for n in (heads, key_heads, key_heads)]
    return [tensor.transpose(1, 2).requires_grad_() for tensor in row]


def run(function, row, *args):
    """Output and gradients of an attention function under a fixed weighting of its output."""
    output = function(*row, *args)
    torch.manual_seed(3)
    found = torch.autograd.grad(output, row, torch.randn(output.shape).to(output.dtype))
    return {"output": output.detach(), **dict(zip(("query", "key", "value"), found, strict=True))}


def reference_varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa=True):
    """What torch's varlen_attn documents, written out: [T, heads, D], sequence i between ends i and i + 1."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    before, after = window_size
    assert before >= -1 and after == 0 and enable_gqa
    q_ends, k_ends = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert (q_ends[-1], k_ends[-1]) == (len(q), len(k))
    assert (max_q, max_k) == (cu_seq_q.diff().max(), cu_seq_k.diff().max())
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    outputs = []
    for a, b, c, d in zip(q_ends, q_ends[1:], k_ends, k_ends[1:], strict=False):
        scores = torch.einsum("qhd,khd->hqk", q[a:b], k[c:d]) * scale
        own = (d - c) - (b - a)  # the key of the first query: bottom right
        seen = torch.ones(b - a, d - c).tril(own)
        seen = (seen if before == -1 else seen.triu(own - before)).bool()
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, float("-inf")).softmax(-1), v[c:d]))
    return torch.cat(outputs)


def on_cuda(kernel):
    """The attention function of CUDA devices, by a kernel that runs anywhere."""
    return partial(varlen_attention, VarlenKernel("fake", kernel))


class Work(TorchDispatchMode):
    """Counts query-key products, forward and backward, and the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if "flash_attention_for_cpu" in str(function):
            # query, key, value, dropout and is_causal; backward gets the gradient before and two results between.
            query, key, *_, causal = args[1:] if "backward" in str(function) else [*args, False][:5]
            half = 2 if causal else 1
            self.products.append(query.shape[0] * query.shape[2] * key.shape[2] / half)
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            self.largest = max(self.largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
        return result
