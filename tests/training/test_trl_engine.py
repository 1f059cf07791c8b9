"""`engine: trl` is TRL called directly where it can be, and our engine wherever the two compute the same thing."""

import pytest
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from smolpost.training.settings import TRLSFT, TRLPreference
from tests.training.tiny_trainers import (
    ASK,
    REPLIES,
    assert_logs_equal,
    assert_weights_equal,
    build,
    build_llama,
    build_qwen3,
    build_windowed,
    char_tokenizer,
    conversation,
    in_trls_words,
    logged,
    pair_trainer,
    sft_trainer,
    stock,
)

SFT_KEYS = ["loss", "grad_norm", "num_tokens"]
PAIR_KEYS = ["loss", "grad_norm", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"]
PAIR_KEYS += ["logps/chosen", "logps/rejected"]
OF_ONE_PASS = ["entropy", "mean_token_accuracy"]  # TRL's are means of forward passes, ours are means of tokens


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


# ---------------------------------------------------------------- beside TRL called directly, on text


@pytest.fixture(scope="module")
def chatml():
    return char_tokenizer("chatml")


IN_ORDER = {
    "max_length": None, "train_sampling_strategy": "sequential", "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
}  # fmt: skip


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_sft_is_trls_on_text(chatml, tmp_path, loss_type):
    """TRL renders nothing: it gets prompts and completions as text, and masks, pads and shifts them itself."""
    replies = [reply for pair in REPLIES for reply in pair]
    rows = [("a", {"messages": conversation(reply)}) for reply in replies]
    changes = {"global_batch_size": 4, "micro_batch_size": 2, "max_steps": 3, "weight_decay": 0, "packing": "none"}
    changes |= {"template": "chatml", "shuffle_packs": False, "trl": TRLSFT(loss_type)}
    model = build(chatml)
    peer = stock(model)
    engine, _, stage = sft_trainer(chatml, tmp_path / "engine", model, rows, engine="trl", **changes)
    engine.train()
    prompt = chatml.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    texts = Dataset.from_list([{"prompt": prompt, "completion": reply} for reply in replies])
    arguments = SFTConfig(**in_trls_words(stage, tmp_path / "trl", **IN_ORDER, loss_type=loss_type))
    direct = SFTTrainer(model=peer, args=arguments, train_dataset=texts, processing_class=chatml)
    direct.train()
    keys = ["loss", "grad_norm", *OF_ONE_PASS]
    assert_logs_equal(logged(engine, keys), logged(direct, keys))
    assert_weights_equal(model, peer)


OF_TRL = [
    {"loss_type": ["hinge"]}, {"loss_type": ["exo_pair"], "label_smoothing": 0.01}, {"loss_type": ["nca_pair"]},
    {"loss_type": ["bco_pair"]}, {"loss_type": ["sppo_hard"]}, {"loss_type": ["aot"], "label_smoothing": 0.1},
    {"loss_type": ["aot_unpaired"]}, {"loss_type": ["discopop"], "discopop_tau": 0.2}, {"loss_type": ["sft"]},
    {"loss_type": ["sigmoid_norm"]}, {"loss_type": ["apo_zero", "sft"], "loss_weights": [1.0, 0.7]},
    {"loss_type": ["sigmoid"], "f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
    {"loss_type": ["sigmoid"], "f_divergence_type": "js_divergence"}, {"loss_type": ["ipo"], "use_weighting": True},
    {"loss_type": ["robust"], "label_smoothing": 0.2}, {"loss_type": ["apo_down"]},
]  # fmt: skip


@pytest.mark.parametrize("trl", OF_TRL, ids=lambda trl: "-".join(map(str, trl.values())))
def test_preference_is_trls_on_text(chatml, tmp_path, trl):
    """Replies of one turn, of which TRL scores what we score: all of it, and the end of the turn."""
    rows = [("a", {"chosen": conversation(good), "rejected": conversation(bad)}) for good, bad in REPLIES]
    changes = {"beta": 0.3, "max_steps": 3, "weight_decay": 0, "template": "chatml", "max_seq_len": 200}
    model, ref_model = build(chatml), build(chatml, seed=7)
    peer, peer_ref = stock(model), stock(ref_model)
    changes |= {"engine": "trl", "trl": TRLPreference(**trl, micro_batch_size=2)}
    engine, _, stage = pair_trainer(chatml, tmp_path / "engine", model, ref_model, rows[:4], **changes)
    order = orders(engine, 3)
    engine.train()
    prompt = chatml.apply_chat_template([ASK], tokenize=False, add_generation_prompt=True)
    texts = [{"prompt": prompt, "chosen": REPLIES[row][0], "rejected": REPLIES[row][1]} for row in order]
    direct = DPOTrainer(
        model=peer, ref_model=peer_ref, train_dataset=Dataset.from_list(texts), processing_class=chatml,
        args=DPOConfig(**in_trls_words(stage, tmp_path / "trl", **IN_ORDER, beta=0.3, **trl)),
    )  # fmt: skip
    direct.train()
    keys = PAIR_KEYS + OF_ONE_PASS
    assert_logs_equal(logged(engine, keys), logged(direct, keys))
    assert_weights_equal(model, peer)


def orders(trainer, epochs):
    """The rows of several epochs in the order of the trainer's batches."""
    rows = []
    for epoch in range(epochs):
        trainer.batches.set_epoch(epoch)
        rows += trainer.batches.order().tolist()
    return rows


# ---------------------------------------------------------------- beside our engine


def assert_engines_equal(ours, trls, keys):
    ours.train()
    trls.train()
    assert_logs_equal(logged(trls, keys), logged(ours, keys))
    assert_weights_equal(trls.model, ours.model)


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
def test_sft_steps_are_our_engines(tokenizer, tmp_path, packing, micro_batch_size):
    """The last step of an epoch has fewer packs; there is more than one epoch, in a new order."""
    changes = {"packing": packing, "max_seq_len": 420, "global_batch_size": 4, "max_steps": 5, "overlong": "refuse"}
    model = build(tokenizer)
    peer = stock(model)
    ours, rows, _ = sft_trainer(tokenizer, tmp_path / "ours", model, **changes)
    assert len(rows) % 4 or packing == "none"
    changes |= {"engine": "trl", "micro_batch_size": micro_batch_size}
    trls, _, _ = sft_trainer(tokenizer, tmp_path / "trl", peer, **changes)
    assert_engines_equal(ours, trls, SFT_KEYS + (OF_ONE_PASS if micro_batch_size == 4 else []))


@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
@pytest.mark.parametrize("make", [build, build_windowed, build_qwen3, build_llama])
def test_trl_tells_documents_apart_under_every_attention(tokenizer, tmp_path, make, attention):
    changes = {"max_seq_len": 420, "global_batch_size": 4, "max_steps": 3, "micro_batch_size": 4}
    model = make(tokenizer)
    peer = stock(model, attention)
    ours, rows, _ = sft_trainer(tokenizer, tmp_path / "ours", model, **changes)
    assert max(map(len, rows["seq_lengths"])) > 1
    trls, _, _ = sft_trainer(tokenizer, tmp_path / "trl", peer, **changes, engine="trl")
    assert_engines_equal(ours, trls, SFT_KEYS + OF_ONE_PASS)


SHARED = [
    {"loss": "apo_zero"},
    {"loss": "apo_down"},
    {"loss": "sigmoid"},
    {"loss": "ipo"},
    {"loss": "robust", "loss_settings": {"label_smoothing": 0.2}},
    {"loss": "sigmoid", "ld_alpha": 0.3},
]


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("pack_tokens", [60, 1000], ids=["many packs", "one pack"])
@pytest.mark.parametrize("shared", SHARED, ids=lambda case: "-".join(map(str, case.values())))
def test_preference_steps_are_our_engines(tokenizer, tmp_path, shared, pack_tokens, micro_batch_size):
    """One of the pairs has turns of a tool inside its completions; the reference is another model than the policy."""
    trl = {"engine": "trl", "trl": TRLPreference(micro_batch_size=micro_batch_size)}
    assert_pairs_equal(tokenizer, tmp_path, build, shared | {"pack_tokens": pack_tokens}, shared | trl)


@pytest.mark.parametrize("make", [build_windowed, build_qwen3, build_llama])
@pytest.mark.parametrize("attention", ["packed", "sdpa", "eager"])
def test_preference_steps_of_other_models(tokenizer, tmp_path, make, attention):
    assert_pairs_equal(tokenizer, tmp_path, make, {}, {"engine": "trl"}, attention)


def test_our_sft_weight_is_trls_two_losses_of_one_pass(tokenizer, tmp_path):
    trl = TRLPreference(["apo_zero", "sft"], [1.0, 0.7], micro_batch_size=4)
    assert_pairs_equal(tokenizer, tmp_path, build, {"sft_weight": 0.7}, {"engine": "trl", "trl": trl})


def test_a_registered_loss_is_trls_of_that_name(hinge, tokenizer, tmp_path):
    trl = {"engine": "trl", "trl": TRLPreference(["hinge"])}
    assert_pairs_equal(tokenizer, tmp_path, build, {"loss": "hinge", "pack_tokens": 60}, trl)


def assert_pairs_equal(tokenizer, folder, make, ours, trls, attention="sdpa"):
    shared = {"beta": 0.3, "max_steps": 4}
    model, ref_model = make(tokenizer), make(tokenizer, seed=7)
    peer, peer_ref = stock(model, attention), stock(ref_model, attention)
    ours, _, _ = pair_trainer(tokenizer, folder / "ours", model, ref_model, **shared, **ours)
    trls, _, stage = pair_trainer(tokenizer, folder / "trl", peer, peer_ref, **shared, **trls)
    assert_engines_equal(ours, trls, PAIR_KEYS + (OF_ONE_PASS if stage.trl.micro_batch_size == 4 else []))
