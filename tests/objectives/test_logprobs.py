"""Token scores against plain log_softmax on full logits, finite differences and TRL."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from smolpost.objectives import logprobs, tiling
from smolpost.objectives.head import Head
from smolpost.objectives.logprobs import token_scores
from tests.objectives.head_problems import CLOSE, gradients, plain, problem

anywhere = settings(deadline=None, max_examples=60)  # a busy CPU is no failure


@pytest.fixture(autouse=True, params=[False, True], ids=["", "unread"])
def unread(request, monkeypatch):
    """Every test here holds for both ways: that of a CPU, and that of a GPU, whose numbers Python never looks at."""
    if request.param:
        monkeypatch.setattr(tiling, "READ_WITHOUT_WAITING", ())


def assert_same_scores(actual, expected, **tolerance):
    logps, entropy, is_top1 = expected
    assert_close(actual.logps, logps, **tolerance)
    assert_close(actual.entropy, entropy, **tolerance)
    assert actual.is_top1.equal(is_top1)


shapes = st.fixed_dictionaries(
    {
        "num_tokens": st.integers(0, 70),
        "num_words": st.integers(1, 90),
        "width": st.integers(1, 9),
        "bias": st.booleans(),
        "softcap": st.sampled_from([None, 2.0]),
        "scale": st.sampled_from([1.0, 0.3, -2.0]),
        "seed": st.integers(0, 99),
    }
)
tile_sizes = st.sampled_from([None, 8, 200, 4000])  # bytes: single elements, parts of a row, several rows


@anywhere
@given(shapes, tile_sizes)
def test_scores_and_gradients_equal_plain_log_softmax(shape, tile_bytes):
    hidden, targets, weights, head = problem(dtype=torch.float64, **shape)
    expected = plain(hidden, targets, head)
    wanted = gradients((weights * expected[0]).sum(), hidden, head)

    per_token = token_scores(hidden, targets, head, tile_bytes=tile_bytes)
    assert_same_scores(per_token, expected)
    assert per_token.total is None
    assert_close(gradients((weights * per_token.logps).sum(), hidden, head), wanted)

    summed = token_scores(hidden, targets, head, weights=weights, tile_bytes=tile_bytes)
    assert_same_scores(summed, expected)
    assert not summed.logps.requires_grad
    assert_close(summed.total, (weights * expected[0]).sum())
    assert_close(gradients(summed.total, hidden, head), wanted)


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 5.0, "scale": 0.5}], ids=["linear", "all"])
@pytest.mark.parametrize("tile_bytes", [None, 30_000])
def test_fp32_is_close_to_plain_in_fp64(options, tile_bytes):
    hidden, targets, weights, head = problem(600, 1003, 24, **options)
    weights /= len(weights)
    double = [None if x is None else x.detach().double().requires_grad_() for x in (hidden, head.weight, head.bias)]
    expected = plain(double[0], targets, Head(*double[1:], *head[2:]))
    wanted = gradients((weights * expected[0]).sum(), double[0], Head(*double[1:], *head[2:]))

    per_token = token_scores(hidden, targets, head, tile_bytes=tile_bytes)
    assert_same_scores(per_token, [x.float() if x.is_floating_point() else x for x in expected], **CLOSE)
    made = gradients((weights * per_token.logps).sum(), hidden, head)
    assert_close(made, tuple(x.float() for x in wanted), atol=1e-6, rtol=1e-5)

    summed = token_scores(hidden, targets, head, weights=weights, tile_bytes=tile_bytes)
    assert_same_scores(summed, [x.float() if x.is_floating_point() else x for x in expected], **CLOSE)
    made = gradients(summed.total * -3, hidden, head)
    assert_close(made, tuple(x.float() * -3 for x in wanted), atol=1e-6, rtol=1e-5)
    assert {x.dtype for x in (*per_token[:2], *summed[:2], summed.total)} == {torch.float32}


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 2.0, "scale": -0.5}], ids=["linear", "all"])
def test_logps_pass_gradcheck(options):
    hidden, targets, _, head = problem(5, 7, 3, dtype=torch.float64, **options)

    def logps(*trained):
        weight, bias = (*trained[1:], None)[:2]
        return token_scores(trained[0], targets, Head(weight, bias, *head[2:]), tile_bytes=100).logps

    assert gradcheck(logps, [x for x in (hidden, head.weight, head.bias) if x is not None])


def test_hand_values():
    # Logits ln 1, ln 2, ln 5: probabilities 1/8, 2/8, 5/8; entropy 3/8 ln 2 + 2/8 ln 4 + 5/8 ln(8/5).
    weight = torch.tensor([1.0, 2.0, 5.0]).log()[:, None]
    scores = token_scores(torch.ones(2, 1), torch.tensor([2, 0]), Head(weight, None, None, 1.0))
    assert_close(scores.logps, torch.tensor([-0.47000363, -2.07944154]))
    assert_close(scores.entropy, torch.tensor([0.90025686, 0.90025686]))
    assert scores.is_top1.tolist() == [True, False]


@pytest.mark.parametrize("tile_bytes", [None, 64, 8])
def test_of_equal_words_the_first_is_top1(tile_bytes):
    weight = torch.tensor([0.0, 3.0, 1.0, 3.0, 3.0, -2.0])[:, None]
    for sign, best in ((1.0, 1), (-1.0, 5), (0.0, 0)):
        hidden = torch.full((6, 1), sign, requires_grad=True)
        for weights in (None, torch.ones(6)):
            scores = token_scores(
                hidden, torch.arange(6), Head(weight, None, None, 1.0), weights=weights, tile_bytes=tile_bytes
            )
            assert scores.is_top1.tolist() == [word == best for word in range(6)]


def test_two_equals_that_share_nearly_all_probability_are_told_apart():
    weight = torch.tensor([-30.0, 9.0, -30.0, 9.0])[:, None]
    scores = token_scores(torch.ones(4, 1), torch.arange(4), Head(weight, None, None, 1.0))
    assert_close(scores.logps[[1, 3]], torch.full((2,), 0.5).log())
    assert scores.is_top1.tolist() == [False, True, False, False]


def test_certain_words_have_log_probability_0_at_most():
    hidden = torch.linspace(0.1, 1, 1000)[:, None]  # one word, of logit x: the rounding of log(exp(x)) goes either way
    head = Head(torch.ones(1, 1), None, None, 1.0)
    scores = token_scores(hidden, torch.zeros(1000, dtype=torch.long), head)
    assert scores.is_top1.all()
    assert -1e-6 < scores.logps.min() <= scores.logps.max() <= 0 <= scores.entropy.min()


def test_saturated_softcap_ties_count_as_argmax_counts_them():
    hidden, targets, _, head = problem(200, 50, 4, softcap=1.0, size=1000.0)
    expected = plain(hidden, targets, head)[2]
    assert 0 < expected.sum() < 20  # many words sit at the cap, and few targets are the first of them
    assert token_scores(hidden, targets, head, tile_bytes=2000).is_top1.equal(expected)


@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("offset", [0.0, -1e4])
def test_large_logits_stay_finite_and_right(size, offset):
    hidden, targets, weights, head = problem(90, 60, 8, bias=True, size=size)
    with torch.no_grad():
        head.bias.add_(offset)
    expected = plain(hidden, targets, head)
    wanted = gradients((weights * expected[0]).sum(), hidden, head)
    for mode in (None, weights):
        scores = token_scores(hidden, targets, head, weights=mode, tile_bytes=9000)
        total = (weights * scores.logps).sum() if mode is None else scores.total
        made = gradients(total, hidden, head)
        assert all(x.isfinite().all() for x in (*made, scores.logps, scores.entropy, total))
        assert_close(scores.logps, expected[0], atol=2e-2, rtol=1e-5)  # fp32 logits near 1e4 are 1e-3 apart
        assert_close(scores.entropy, expected[1], atol=2e-2, rtol=0)
        assert_close(made, wanted, atol=2e-2 * size, rtol=1e-2)
        assert scores.is_top1.equal(expected[2])


def test_shift_is_exact_where_logits_are_merely_offset():
    hidden, targets, weights, head = problem(90, 60, 8, bias=True, dtype=torch.float64)
    offset = head._replace(bias=(head.bias + 500).detach().requires_grad_())
    plainly, shifted = (token_scores(hidden, targets, h, tile_bytes=9000) for h in (head, offset))
    assert_same_scores(shifted, [x.detach() for x in plainly[:3]])
    made = [gradients((weights * s.logps).sum(), hidden, h) for s, h in ((plainly, head), (shifted, offset))]
    assert_close(made[1], made[0])


def test_nan_is_not_hidden():
    hidden, targets, weights, head = problem(5, 9, 4)
    with torch.no_grad():
        hidden[2, 1] = float("nan")
    for mode in (None, weights):
        scores = token_scores(hidden, targets, head, weights=mode)
        assert scores.logps.isnan().tolist() == [False, False, True, False, False]
    assert scores.total.isnan()


def test_upstream_gradient_may_differ_from_token_to_token_and_come_twice():
    hidden, targets, _, head = problem(40, 30, 6, dtype=torch.float64)
    logps = token_scores(hidden, targets, head).logps
    expected = plain(hidden, targets, head)[0]
    for loss in (lambda x: x.square().mean(), lambda x: torch.sigmoid(x[:20].sum() - x[20:].sum())):
        made = torch.autograd.grad(loss(logps), [hidden, head.weight], retain_graph=True)
        wanted = torch.autograd.grad(loss(expected), [hidden, head.weight], retain_graph=True)
        assert_close(made, wanted)


def test_total_has_one_backward():
    hidden, targets, weights, head = problem(4, 5, 3)
    total = token_scores(hidden, targets, head, weights=weights).total
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="total has one backward"):
        total.backward()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("frozen", [{"hidden"}, {"weight"}, {"bias"}, {"weight", "bias"}, {"hidden", "weight"}])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen, weighted):
    hidden, targets, weights, head = problem(30, 40, 5, bias=True)
    parts = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    expected = dict(zip(parts, gradients((weights * plain(hidden, targets, head)[0]).sum(), hidden, head), strict=True))
    for name in frozen:
        parts[name].requires_grad_(False)
    scores = token_scores(hidden, targets, head, weights=weights if weighted else None)
    (scores.total if weighted else (weights * scores.logps).sum()).backward()
    for name, part in parts.items():
        assert part.grad is None if name in frozen else torch.allclose(part.grad, expected[name], atol=1e-5)
    assert_close(scores.entropy, plain(hidden, targets, head)[1], **CLOSE)


@pytest.mark.parametrize("weighted", [False, True])
def test_an_empty_batch_gives_zero_gradients(weighted):
    hidden, targets, weights, head = problem(0, 40, 5, bias=True)
    scores = token_scores(hidden, targets, head, weights=weights if weighted else None)
    assert scores.logps.shape == scores.entropy.shape == scores.is_top1.shape == (0,)
    (scores.total if weighted else scores.logps.sum()).backward()
    assert hidden.grad.shape == (0, 5)
    assert not head.weight.grad.any() and not head.bias.grad.any()


def test_without_metrics_they_are_not_made():
    hidden, targets, weights, head = problem(30, 40, 5)
    for mode in (None, weights):
        scores = token_scores(hidden, targets, head, weights=mode, metrics=False)
        assert scores.entropy is None and scores.is_top1 is None
        assert_close(scores.logps, plain(hidden, targets, head)[0])


class Sizes(TorchDispatchMode):
    """The largest tensor any operation returns, and how many matrix products there are."""

    def __init__(self):
        super().__init__()
        self.largest, self.products = 0, 0

    def __torch_dispatch__(self, func, kinds, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.products += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        made = result if isinstance(result, (tuple, list)) else [result]
        self.largest = max([self.largest, *(x.untyped_storage().nbytes() for x in made if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("weighted", [False, True])
def test_logits_never_exist_as_a_whole(weighted):
    hidden, targets, weights, head = problem(400, 3000, 8)
    with Sizes() as sizes:
        scores = token_scores(hidden, targets, head, weights=weights if weighted else None, tile_bytes=200_000)
        (scores.total if weighted else (weights * scores.logps).sum()).backward()
    assert sizes.largest <= 200_000  # the logits would be 4.8 MB, the weight's gradient is 96 kB


@pytest.mark.parametrize("trained, products", [("both", 3), ("hidden", 2), ("weight", 2), ("neither", 1)])
def test_weights_known_beforehand_save_a_product(trained, products):
    hidden, targets, weights, head = problem(20, 30, 5)
    hidden.requires_grad_(trained in ("both", "hidden"))
    head.weight.requires_grad_(trained in ("both", "weight"))
    with Sizes() as one_pass:
        total = token_scores(hidden, targets, head, weights=weights).total
        if trained != "neither":
            total.backward()
    with Sizes() as two_passes:
        logps = token_scores(hidden, targets, head).logps
        if trained != "neither":
            logps.sum().backward()
    assert one_pass.products == products
    assert two_passes.products == products + (trained != "neither")


def test_no_grad_makes_no_gradient():
    hidden, targets, weights, head = problem(20, 30, 5)
    with torch.no_grad(), Sizes() as sizes:
        scores = token_scores(hidden, targets, head, weights=weights)
    assert sizes.products == 1
    assert not scores.total.requires_grad
    assert_close(scores.total, (weights * plain(hidden, targets, head)[0]).sum())


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("mixed", [False, True], ids=["cpu", "as on cuda"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_close_to_fp32(weighted, mixed, autocast, monkeypatch):
    hidden, targets, weights, head = problem(300, 200, 32, bias=True, size=3.0)
    weights = weights.abs() / len(weights)
    expected = plain(hidden, targets, head)
    wanted = gradients((weights * expected[0]).sum(), hidden, head)
    if mixed:  # CUDA's products read bf16 and write fp32; here they are imitated, and the code around them is CUDA's

        def multiply(a, b, out, add=False):
            assert a.dtype == b.dtype == torch.bfloat16 and out.dtype == torch.float32
            out.copy_(a.float() @ b.float() + (out if add else 0))

        monkeypatch.setattr(tiling, "BF16_INTO_FP32", ("cpu",))
        for module in (tiling, logprobs):
            monkeypatch.setattr(module, "multiply", multiply)
    given = hidden if autocast else hidden.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        scores = token_scores(given, targets, head, weights=weights if weighted else None, tile_bytes=50_000)
        total = scores.total if weighted else (weights * scores.logps).sum()
    made = gradients(total, given, head)
    assert [x.dtype for x in made] == [given.dtype, torch.float32, torch.float32]
    assert scores.logps.dtype == scores.entropy.dtype == torch.float32
    assert_close(scores.logps, expected[0], atol=0.05, rtol=0)
    assert_close(scores.entropy, expected[1], atol=0.03, rtol=0)
    assert (scores.is_top1 == expected[2]).float().mean() > 0.98
    for x, y in zip(made, wanted, strict=True):
        assert (x - y).norm() < 0.01 * y.norm()


@pytest.mark.parametrize("mixed", [False, True], ids=["cpu", "as on cuda"])
def test_bf16_keeps_the_gradient_of_confident_tokens(mixed, monkeypatch):
    # p = 0.9995 is 1 in bf16: a gradient of 1 - p taken after rounding would vanish.
    monkeypatch.setattr(tiling, "BF16_INTO_FP32", ("cpu",) if mixed else ())
    for module in (tiling, logprobs):
        monkeypatch.setattr(
            module, "multiply", lambda a, b, out, add=False: out.copy_(a.float() @ b.float() + add * out)
        )
    hidden = torch.tensor([[7.6]], dtype=torch.bfloat16, requires_grad=True)
    head = Head(torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16), None, None, 1.0)
    token_scores(hidden, torch.tensor([0]), head, weights=torch.ones(1)).total.backward()
    p = torch.sigmoid(hidden.detach().float())
    assert_close(hidden.grad.float(), 1 - p, rtol=0.01, atol=0)


@pytest.mark.parametrize("options", [{}, {"bias": True, "softcap": 3.0, "scale": 0.7}], ids=["linear", "all"])
def test_trl_agrees(options):
    hidden, targets, weights, head = problem(300, 700, 16, **options)
    logps, entropy, _, _, is_top1 = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, targets, 1.0, 256, head.softcap, head.scale, ("entropy", "is_top1")
    )
    wanted = gradients((weights * logps).sum(), hidden, head)
    for mode in (None, weights):
        scores = token_scores(hidden, targets, head, weights=mode, tile_bytes=100_000)
        assert_same_scores(scores, (logps, entropy.detach(), is_top1), **CLOSE)
        total = (weights * scores.logps).sum() if mode is None else scores.total
        assert_close(gradients(total, hidden, head), wanted, **CLOSE)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"targets": torch.tensor([0, 5, 2])}, "targets lie in 0 to 5, the vocabulary in 0 to 4"),
        ({"targets": torch.tensor([0, -100, 2])}, "targets lie in -100 to 2"),
        ({"targets": torch.tensor([0, 1])}, r"targets has shape \[2\], hidden states need \[3\]"),
        ({"weights": torch.ones(2)}, r"weights has shape \[2\]"),
        ({"weights": torch.ones(3, requires_grad=True)}, "weights require a gradient; detach them"),
        ({"hidden": torch.ones(3, 7)}, r"hidden has shape \[3, 7\], the head takes \[T, 4\]"),
        ({"hidden": torch.ones(1, 3, 4)}, r"hidden has shape \[1, 3, 4\]"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    hidden, _, weights, head = problem(3, 5, 4)
    given = {"hidden": hidden, "targets": torch.tensor([0, 1, 2]), "weights": weights, **change}
    with pytest.raises(ValueError, match=message):
        token_scores(given["hidden"], given["targets"], head, weights=given["weights"])
