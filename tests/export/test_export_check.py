"""The check itself: greedy replies, distances of logits, and what it must not let through."""

import numpy as np
import pytest
import torch

from smolpost.chat.tokenizer import build_tokenizer
from smolpost.errors import UserError
from smolpost.evaluation.task import Sample
from smolpost.evaluation.tasks.recall import Recall
from smolpost.evaluation.tasks.ruler import Ruler
from smolpost.export.check import LengthCheck, Limits, ask, compare, logit_difference, refuse_failed
from smolpost.export.command import _prompt
from smolpost.export.folder import ExportSource
from smolpost.export.session import CHUNK, GreedyEngine, TorchSession
from smolpost.inference.local import LocalEngine
from smolpost.model import SmolLM3ForCausalLM
from tests.export.export_models import THETA, letters, save_checkpoint


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return ExportSource(save_checkpoint(tmp_path_factory.mktemp("check") / "model"))


def load(source, **config):
    return SmolLM3ForCausalLM.from_pretrained(source.folder, dtype=torch.float32, **config)


def wrong_theta(source):
    return load(source, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0})


class Moved(TorchSession):
    """A session whose logits at one position are another's."""

    def __init__(self, model, position, by):
        self.position, self.by = position, by
        super().__init__(model)

    def reset(self):
        super().reset()
        self.seen = 0

    def feed(self, ids):
        logits = super().feed(ids)
        if 0 <= self.position - self.seen < len(ids):
            logits[self.position - self.seen, 7] += self.by
        self.seen += len(ids)
        return logits


class Known:
    """A task whose score is known for each side."""

    def __init__(self, ours, exported):
        self.scores = {LocalEngine: ours, GreedyEngine: exported}

    def measure(self, engine, items):
        return [Sample(item.id, {"found": self.scores[type(engine)], "64/depth_0.50": 1.0}) for item in items]


def known(asked, *scores):
    return {n: LengthCheck(Known(*pair), items) for (n, (_, items)), pair in zip(asked.items(), scores, strict=True)}


def test_greedy_engine_replies_as_the_local_one(source):
    model = load(source)
    prompts = [[i % 100 for i in range(CHUNK + 40)], [5, 9, 2]]  # one is fed in two chunks
    local = LocalEngine(model, source.tokenizer).generate(prompts, max_new_tokens=12)
    assert (
        GreedyEngine(TorchSession(model), source.tokenizer, [source.tokenizer.eos_token_id]).generate(
            prompts, max_new_tokens=12
        )
        == local
    )


def test_greedy_engine_ends_with_the_stop_token(source):
    class Stops:
        def reset(self):
            self.fed = 0

        def feed(self, ids):
            self.fed += 1
            logits = np.zeros((len(ids), 200), np.float32)
            logits[-1, source.tokenizer.eos_token_id if self.fed == 3 else 20] = 1
            return logits

    [[reply]] = GreedyEngine(Stops(), source.tokenizer, [source.tokenizer.eos_token_id]).generate(
        [[1, 2]], max_new_tokens=9
    )
    assert (reply.num_tokens, reply.cut) == (3, False)
    assert reply.text == source.tokenizer.decode([20, 20])


def test_sampling_is_refused(source):
    with pytest.raises(UserError, match="scored greedily"):
        GreedyEngine(None, source.tokenizer, []).generate([[1]], max_new_tokens=1, temperature=0.6)


@pytest.mark.parametrize("position", [0, CHUNK - 1, CHUNK, 299])  # first, chunk's ends, fed one by one
def test_logit_difference_sees_every_position(source, position):
    model = load(source)
    ids = [i % 100 for i in range(300)]
    assert logit_difference(model, TorchSession(model), ids) < 1e-4
    assert logit_difference(model, Moved(model, position, 0.5), ids) == pytest.approx(0.5, abs=1e-4)
    assert np.isnan(logit_difference(model, Moved(model, position, np.nan), ids))


def test_wrong_theta_is_flagged(source):
    assert source.config.rope_parameters["rope_theta"] == THETA
    report = compare(load(source), TorchSession(wrong_theta(source)), source.tokenizer, letters(300))
    assert report["lengths"][300]["logit_difference"] > 0.5
    with pytest.raises(UserError, match=r"the mlx export is not the checkpoint: logits at 300 tokens differ by \d"):
        refuse_failed(report, "mlx")


def test_wrong_theta_is_flagged_beyond_bf16_rounding(source):
    """16-bit weights widen the limit by what our own model moves; a wrong theta moves more."""
    ours = load(source)
    for model, good in ((load(source), True), (wrong_theta(source), False)):
        session = TorchSession(model.to(torch.bfloat16))
        report = compare(ours, session, source.tokenizer, letters(300), dtype="bfloat16")
        row = report["lengths"][300]
        assert row["logit_limit"] == pytest.approx(3 * row["rounding"])
        assert row["rounding"] > 0.01
        assert bool(report["failures"]) is not good


def test_nan_fails(source):
    model = load(source)
    report = compare(model, Moved(model, 3, np.nan), source.tokenizer, letters(64))
    assert report["failures"] == ["logits at 64 tokens differ by nan (limit: 0.01)"]


def test_lost_recall_fails_though_logits_agree(source):
    model = load(source)
    limits = Limits(recall=0.1)
    asked = known(letters(64, 128, 256), (1.0, 0.9), (1.0, 0.72), (0.5, 0.9))
    report = compare(model, TorchSession(model), source.tokenizer, asked, limits=limits)
    assert report["failures"] == ["recall at 128 tokens is 0.720 and 1.000 in our model (limit: 0.1 less)"]
    assert report["notes"] == []
    assert report["lengths"][128]["num_prompts"] == 2


def test_recall_that_shows_nothing_is_said(source):
    model = load(source)
    report = compare(model, TorchSession(model), source.tokenizer, known(letters(64), (0.1, 0.1)))
    assert report["failures"] == []
    assert "recall shows nothing here" in report["notes"][0]


def test_prompts_have_the_date_of_training(source):
    """Another header than the one it was trained with would measure another thing."""
    tokenizer = merging_tokenizer()
    [item] = ask(tokenizer, [1500], num_prompts=1, seed=0)[1500].items
    for text in (tokenizer.decode(item.ids), _prompt(source)):
        assert "Today Date: 08 July 2025\n" in text


def test_recall_is_asked_in_the_alphabet_the_tokenizer_has(source, tmp_path):
    asked = ask(source.tokenizer, [128, 256], num_prompts=2, seed=0)
    assert {n: [type(task), len(items)] for n, (task, items) in asked.items()} == {128: [Recall, 2], 256: [Recall, 2]}
    assert all(n - 4 <= len(item.ids) + item.max_new_tokens <= n for n, (_, items) in asked.items() for item in items)
    [(task, items)] = ask(merging_tokenizer(), [1500], num_prompts=2, seed=0).values()
    assert type(task) is Ruler
    assert all(len(item.ids) + item.max_new_tokens <= 1500 for item in items)
    with pytest.raises(UserError, match=r"^--lengths=16 is too short"):
        ask(source.tokenizer, [16], num_prompts=2, seed=0)


def merging_tokenizer():
    return build_tokenizer(
        ["10 20 30 40 50 60 70 80 90 what is the number" * 9], kind="bpe", vocab_size=320, template="smollm3"
    )
