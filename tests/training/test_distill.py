"""Distillation equals TRL's own trainer on sampled replies and a divergence worked out by hand on given ones."""

import copy
import json

import datasets
import pytest
import torch
from trl import DistillationConfig, DistillationTrainer

from smolpost.errors import UserError
from smolpost.training.adapters import add_adapters
from smolpost.training.optimizer import decayed_parameters
from smolpost.training.settings import DistillTraining, LoRA
from smolpost.training.teacher import check_teacher, template_note
from smolpost.training.with_trl import distill
from smolpost.training.with_trl.rollouts import FOLDER
from tests.training.tiny_trainers import CPU, assert_logs_equal, build, in_trls_words, logged, settings, stock

NUM_ROWS = 12


@pytest.fixture(scope="module")
def tokenizer():
    from tests.char_model import char_tokenizer

    return char_tokenizer()


@pytest.fixture(scope="module")
def student(tokenizer):
    return build(tokenizer)


@pytest.fixture(scope="module")
def teacher(tokenizer):
    """With larger weights, so that the divergence is not small."""
    model = build(tokenizer, seed=7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def question(n: int) -> list[dict]:
    return [{"role": "user", "content": "a" * (n + 1)}]


@pytest.fixture(scope="module")
def rows(tokenizer):
    """Prompts and replies of many lengths; the first token of the second reply is masked."""
    found = []
    for n in range(NUM_ROWS):
        prompt = tokenizer.apply_chat_template(
            question(n), enable_thinking=False, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        reply = [*tokenizer("b" * (NUM_ROWS - n)).input_ids, tokenizer.eos_token_id]
        found.append({"prompt_ids": prompt, "completion_ids": reply, "completion_mask": [1] * len(reply)})
    found[1]["completion_mask"][0] = 0
    return datasets.Dataset.from_list(found)


def stage_of(**changes) -> DistillTraining:
    shared = {"teacher": "teacher", "max_new_tokens": 8, "max_steps": 3, "global_batch_size": 4, "micro_batch_size": 2}
    return DistillTraining(**settings(**shared | changes))


def trained(stage, rows, tokenizer, model, teacher, folder, resume=None) -> distill.Distillation:
    distill.check("distill", stage, rows, CPU)
    arguments = distill.arguments(stage, 1, len(rows), folder, CPU)
    trainer = distill.trainer(stage, model, tokenizer, rows, lambda: copy.deepcopy(teacher), arguments, 1, CPU)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class SameDecay(DistillationTrainer):
    """TRL decays the embedding; the comparison is about samples and loss."""

    def get_decay_parameter_names(self, model):
        return decayed_parameters(model)


@pytest.mark.parametrize(
    ("beta", "sampling"), [(1.0, {"temperature": 0.7, "top_p": 0.9}), (0.0, {}), (0.3, {"top_k": 5})]
)
def test_sampled_steps_equal_trls(tokenizer, student, teacher, rows, tmp_path, beta, sampling):
    """Samples, loss, gradient norm and entropy of every step, and the weights after them."""
    stage = stage_of(divergence_beta=beta, **sampling)
    ours = trained(stage, rows, tokenizer, copy.deepcopy(student), teacher, tmp_path / "ours")
    order = ours.batches.order().tolist()
    words = in_trls_words(stage, tmp_path / "trl")
    trl = SameDecay(
        model=stock(student), teacher_model=stock(teacher), processing_class=copy.deepcopy(tokenizer),
        train_dataset=datasets.Dataset.from_list([{"prompt": question(n)} for n in order]),
        args=DistillationConfig(
            **words, seed=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, shuffle_dataset=False,
            chat_template_kwargs={"enable_thinking": False}, max_completion_length=8, beta=beta, **sampling,
        ),
    )  # fmt: skip
    trl.train()
    keys = ("loss", "grad_norm", "entropy", "num_tokens", "completions/mean_length", "completions/clipped_ratio")
    assert_logs_equal(logged(ours, keys), logged(trl, keys))
    for name, tensor in trl.model.state_dict().items():
        torch.testing.assert_close(ours.model.state_dict()[name], tensor, atol=2e-5, rtol=0)
    assert [entry["on_policy"] for entry in logged(ours, ["on_policy"])] == [1, 1, 1]


def divergence(teacher_logits, student_logits, beta):
    """[T] in float64, from its definition."""
    p, q = (logits.double().softmax(-1) for logits in (teacher_logits, student_logits))
    if beta in (0, 1):
        return ((p * (p / q).log()) if beta == 0 else (q * (q / p).log())).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * (p / m).log() + (1 - beta) * q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_given_replies_have_the_divergence_of_its_definition(tokenizer, student, teacher, rows, tmp_path, beta):
    """The mean over the tokens of the whole global batch, each row alone and without padding; masked tokens are out."""
    stage = stage_of(on_policy=0.0, divergence_beta=beta, temperature=1.5, max_steps=1, max_new_tokens=10**6)
    trainer = trained(stage, rows, tokenizer, copy.deepcopy(student), teacher, tmp_path)
    found = []
    for n in trainer.batches.order()[:4].tolist():
        row = rows[n]
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        first = len(row["prompt_ids"])
        with torch.no_grad():
            logits = [model(ids).logits[0, first - 1 : -1] / 1.5 for model in (teacher, student)]
        found.append(divergence(*logits, beta)[torch.tensor(row["completion_mask"]).bool()])
    assert logged(trainer, ["loss"])[0]["loss"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-5)
    assert not (tmp_path / FOLDER).exists()


def test_sampled_and_given_replies_share_one_mean(tokenizer, student, teacher, rows, tmp_path):
    """Micro-batches of one row, whose replies are of different lengths: no row or forward pass counts more."""
    stage = stage_of(on_policy=0.2, divergence_beta=0.0, micro_batch_size=1, max_steps=2)
    trainer = trained(stage, rows, tokenizer, copy.deepcopy(student), teacher, tmp_path)
    samples = {line["row"]: line for line in kept(tmp_path, step=1)}
    taken = trainer.batches.order()[:4].tolist()
    assert 0 < len(samples) < 4 and samples.keys() <= set(taken)
    found = []
    for n in taken:
        row = rows[n]
        sample = samples.get(n)
        reply = tokenizer(sample["completion"]).input_ids if sample else row["completion_ids"]
        mask = torch.tensor([1] * len(reply) if sample else row["completion_mask"]).bool()
        assert not sample or len(reply) == sample["num_tokens"]
        ids = torch.tensor([row["prompt_ids"] + reply])
        with torch.no_grad():
            logits = [model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1] for model in (teacher, student)]
        found.append(divergence(*logits, 0)[mask])
    first = logged(trainer, ["loss", "on_policy"])[0]
    assert first["loss"] == pytest.approx(torch.cat(found).mean().item(), rel=1e-5)
    assert first["on_policy"] == len(samples) / 4


def kept(folder, step: int) -> list[dict]:
    return [json.loads(line) for line in (folder / FOLDER / f"step-{step:06d}.jsonl").read_text().splitlines()]


@pytest.mark.filterwarnings("error:`gradient_checkpointing_:FutureWarning")
def test_what_was_sampled_is_kept(tokenizer, student, teacher, rows, tmp_path):
    stage = stage_of(max_steps=3, logging_steps=2, kept_samples=3, activation_checkpointing="full")
    trainer = trained(stage, rows, tokenizer, copy.deepcopy(student), teacher, tmp_path)
    assert sorted(file.name for file in (tmp_path / FOLDER).iterdir()) == [
        "step-000001.jsonl", "step-000002.jsonl"
    ]  # fmt: skip
    for step in (1, 2):
        lines = kept(tmp_path, step)
        taken = trainer.batches.order()[4 * step - 4 : 4 * step].tolist()
        assert [line["row"] for line in lines] == taken[:3]
        for line in lines:
            assert line["prompt"] == tokenizer.decode(rows[line["row"]]["prompt_ids"])
            stopped = line["completion"].endswith(tokenizer.eos_token)
            assert line["ended_by"] == ("stop token" if stopped else "max_new_tokens")
            assert stopped or line["num_tokens"] == 8


def test_which_rows_are_sampled_does_not_hang_on_the_ranks(tokenizer, student, teacher, rows, tmp_path):
    trainer = trained(stage_of(on_policy=0.4, max_steps=1), rows, tokenizer, copy.deepcopy(student), teacher, tmp_path)
    drawn = []
    for step in range(200):
        trainer.state.global_step = step
        drawn += [trainer._samples({"row": row}) for row in range(NUM_ROWS)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.4, abs=0.03)
    again = [trainer._samples({"row": row}) for row in reversed(range(NUM_ROWS))]
    assert again == drawn[-NUM_ROWS:][::-1]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
def test_a_teacher_that_is_the_student_changes_nothing(tokenizer, student, rows, tmp_path, beta):
    stage = stage_of(on_policy=0.5, divergence_beta=beta, weight_decay=0.0)
    trainer = trained(stage, rows, tokenizer, copy.deepcopy(student), student, tmp_path)
    assert max(abs(entry["loss"]) for entry in logged(trainer, ["loss"])) < 1e-6
    assert max(entry["grad_norm"] for entry in logged(trainer, ["grad_norm"])) < 1e-5


def test_the_student_comes_nearer_to_the_teacher(tokenizer, student, teacher, rows, tmp_path):
    stage = stage_of(max_steps=30, learning_rate=1e-2, divergence_beta=1.0)
    trainer = trained(stage, rows, tokenizer, copy.deepcopy(student), teacher, tmp_path)
    losses = [entry["loss"] for entry in logged(trainer, ["loss"])]
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("cut", [2, 3, 5], ids=["inside an epoch", "at its end", "inside the next"])
@pytest.mark.parametrize("r", [0, 2])
def test_interrupted_equals_uninterrupted(tokenizer, student, teacher, rows, tmp_path, cut, r):
    """Bit for bit: the samples after the cut, the log, the weights. With adapters, dropout draws numbers as well."""
    stage = stage_of(on_policy=0.7, max_steps=7, save_steps=1, save_total_limit=9, lora=LoRA(r=r, dropout=0.1))

    def model():
        return add_adapters(copy.deepcopy(student), stage.lora, 1) if r else copy.deepcopy(student)

    whole = trained(stage, rows, tokenizer, model(), teacher, tmp_path)
    samples = {step: kept(tmp_path, step) for step in range(cut + 1, 8)}
    again = trained(stage, rows, tokenizer, model(), teacher, tmp_path, str(tmp_path / f"checkpoint-{cut}"))
    assert {step: kept(tmp_path, step) for step in samples} == samples
    keys = ("loss", "grad_norm", "on_policy", "num_tokens", "epoch")
    assert logged(again, keys) == logged(whole, keys)
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], tensor), name


def test_adapters_alone_learn(tokenizer, student, teacher, rows, tmp_path):
    stage = stage_of(lora=LoRA(r=2), learning_rate=1e-2)
    model = add_adapters(copy.deepcopy(student), stage.lora, 1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained(stage, rows, tokenizer, model, teacher, tmp_path)
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved and all("lora_" in name for name in moved)


def test_padding_on_the_left_changes_no_reply(tokenizer, student, rows):
    """Packed attention leaves padded batches with a cache to SDPA: the same as eager attention, row by row."""
    prompts = [rows[n]["prompt_ids"] for n in (0, 5, 11)]
    longest = max(map(len, prompts))
    padded = torch.tensor([[tokenizer.pad_token_id or 0] * (longest - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    words = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    found = student.generate(padded, attention_mask=mask, **words)
    eager = stock(student)
    eager.set_attn_implementation("eager")
    for i, ids in enumerate(prompts):
        alone = eager.generate(torch.tensor([ids]), **words)
        assert (
            found.sequences[i, longest:].tolist()[: alone.sequences.shape[1] - len(ids)]
            == alone.sequences[0, len(ids) :].tolist()
        )
        for step, logits in enumerate(alone.logits):
            torch.testing.assert_close(found.logits[step][i], logits[0], atol=1e-5, rtol=1e-5)


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"global_batch_size": 3},
            "stages.distill.global_batch_size=3 is not a multiple of 2, the rows that "
            "stages.distill.micro_batch_size=2 take at once, and TRL has no smaller forward pass; change one of them",
        ),
        (
            {"global_batch_size": 8},
            "stages.distill: 12 rows leave 4 for the last step of an epoch, which TRL's trainer leaves out; "
            "stop before with stages.distill.max_steps=1, or set stages.distill.global_batch_size to a divisor of 12",
        ),
        (
            {"max_seq_len": 203},
            "stages.distill.max_seq_len=203, but the longest prompt has 201 tokens and a sampled reply up to "
            "stages.distill.max_new_tokens=8; set it to 209 or more, or lower max_new_tokens",
        ),
    ],
)
def test_what_trl_cannot_do_is_refused(rows, changes, message):
    with pytest.raises(UserError) as caught:
        distill.check("distill", stage_of(**changes), rows, CPU)
    assert str(caught.value) == message


def test_the_remedies_work(rows):
    distill.check("distill", stage_of(global_batch_size=8, max_steps=1), rows, CPU)
    distill.check("distill", stage_of(global_batch_size=6, max_steps=4), rows, CPU)
    distill.check("distill", stage_of(max_seq_len=209), rows, CPU)


def test_a_teacher_with_another_tokenizer_is_refused(tokenizer, student, tmp_path):
    folders = {name: tmp_path / name for name in ("student", "same", "other", "wider")}
    for name, folder in folders.items():
        spoken, model = copy.deepcopy(tokenizer), student
        if name == "other":
            spoken.add_tokens(["<note>"])
        if name == "wider":
            model = copy.deepcopy(student)
            model.resize_token_embeddings(student.config.vocab_size + 8)
        model.save_pretrained(folder)
        spoken.save_pretrained(folder)
    stage = stage_of()
    check_teacher("distill", stage, folders["same"], folders["student"], "packed")
    where = "stages.distill.teacher=teacher has "
    size = student.config.vocab_size
    for name, message in {
        "other": f"{where}another tokenizer than x, so it cannot score the student's tokens: id {len(tokenizer)} is "
        "'<note>' in the teacher's and no token in the student's; take a teacher with the student's tokenizer",
        "wider": f"{where}a vocab_size of {size + 8} and x one of {size}, and a divergence needs the same tokens; take "
        "a teacher with as many",
    }.items():
        with pytest.raises(UserError) as caught:
            check_teacher("distill", stage, folders[name], folders["student"], "packed")
        assert str(caught.value) == message


def test_a_teacher_with_another_template_is_noted(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    assert template_note("distill", stage_of(), tmp_path) == ""
    assert template_note("distill", stage_of(template="chatml"), tmp_path) == (
        "stages.distill.teacher=teacher has another chat template than stages.distill.template=chatml; it scores "
        "replies to prompts that are rendered with the stage's"
    )
