"""A healthy miniature passes every check; each planted fault fails exactly the check that is there for it."""

import io
import json
import re
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from smolpost.chat.masks import Encoded
from smolpost.chat.render import load_template, render
from smolpost.data.collate import collate_packs
from smolpost.doctor import check_texts as doctor_text
from smolpost.doctor import stage_sample as doctor_case
from smolpost.doctor.checks import Check, diagnose, exit_code, report
from smolpost.errors import UserError
from smolpost.model import attention
from smolpost.model.attention_segments import Segment
from smolpost.objectives.losses import ApoZero
from smolpost.training import sft
from tests.doctor.clinic import ASK, NO_THINK, conversations, failed, pairs

# ---------------------------------------------------------------- healthy


def test_a_healthy_sft_stage_passes_every_check(healthy):
    found = healthy.diagnose("sft")
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(
        ("rows", "template", "template tokens", "stop token", "mask", "control tokens", "packing", "accumulation",
         "chat parity", "vocabulary", "lengths"), "pass",
    )  # fmt: skip
    assert exit_code([*found.values()]) == 0
    assert "0 of 10 rows refused; sample of 10: 5 no_think, 5 think" in found["rows"].detail
    assert "10 texts and 14 shorter histories of them, 0 differ" in found["template"].detail
    assert "12 of 12 replies end with <|im_end|>" in found["stop token"].detail
    labelled, named = re.match(r"(\d+) tokens labelled, (\d+) named", found["mask"].detail).groups()
    assert labelled == named and int(named) > 100
    assert "0 of 5 control tokens" in found["control tokens"].detail


def test_a_healthy_apo_stage_passes_every_check(healthy):
    found = healthy.diagnose("apo")
    assert {name: check.status for name, check in found.items()} == dict.fromkeys(
        ("rows", "template", "template tokens", "stop token", "shared prompt", "pair mask", "control tokens", "pairs",
         "reference loss", "accumulation", "equal pairs", "chat parity", "vocabulary", "lengths"), "pass",
    )  # fmt: skip
    assert "loss 1.000000, theory apo_zero 1.000000; " in found["reference loss"].detail
    assert float(re.search("reward (.+);", found["reference loss"].detail).group(1)) < 1e-7
    assert found["shared prompt"].detail.startswith("9 pairs share ")


@pytest.mark.parametrize(
    ("settings", "theory"),
    [
        (["stages.apo.loss=apo_down"], "loss 1.000000, theory apo_down 1.000000"),
        (["stages.apo.loss=sigmoid"], "loss 0.693147, theory sigmoid 0.693147"),
        (
            ["stages.apo.loss=robust", "+stages.apo.loss_settings.label_smoothing=0.2"],
            "loss 0.693147, theory robust 0.693147",
        ),
        (["stages.apo.loss=ipo", "stages.apo.beta=0.1"], "loss 25.000000, theory ipo 25.000000"),  # 1 / (2 x 0.1)^2
        (["stages.apo.sft_weight=0.5"], "theory apo_zero 1.000000 + 0.5 x "),
    ],
)
def test_the_loss_at_the_reference_is_what_theory_says(healthy, settings, theory):
    check = healthy.diagnose("apo", *settings, rows=4)["reference loss"]
    assert check.status == "pass" and theory in check.detail


def test_a_registered_loss_passes(hinge, healthy):
    words = ["stages.apo.loss=hinge", "+stages.apo.loss_settings.margin=0.75"]
    check = healthy.diagnose("apo", *words, rows=4)["reference loss"]
    assert check.status == "pass" and "loss 0.750000, theory hinge 0.750000" in check.detail


SETTINGS = [
    ["packing=wrapped", "max_seq_len=90"],
    ["overlong=split", "max_seq_len=64"],
    ["overlong=truncate", "max_seq_len=90"],
    ["last_turn_only=true"],
    ["train_roles=[all]"],
    ["train_reasoning=false"],
]


@pytest.mark.parametrize("settings", SETTINGS, ids="-".join)
def test_no_setting_of_a_healthy_stage_fails(healthy, settings):
    found = healthy.diagnose("sft", *(f"stages.sft.{word}" for word in settings))
    assert failed(found) == set()
    assert found["mask"].status == "pass"


def test_pairs_may_score_the_last_turn_alone(healthy):
    assert failed(healthy.diagnose("apo", "stages.apo.last_turn_only=true")) == set()


# ---------------------------------------------------------------- faults of sft stages


def test_a_broken_row_is_found(clinic):
    clinic.write("sft", [*conversations(), {"messages": [ASK]}])
    found = clinic.diagnose("sft")
    assert failed(found) == {"rows"}
    assert (
        found["rows"].detail.startswith("1 of 11 rows refused") and "smoltalk2_sft.jsonl:11: " in found["rows"].detail
    )


def test_a_template_that_rewrites_earlier_turns_is_found(clinic):
    shown = "set reply = reply_of(message, where, thinking%s, as_code)"
    spoilt = clinic.template((shown % "", shown % " and loop.last"))
    found = clinic.diagnose("sft", f"stages.sft.{spoilt}")
    assert failed(found) == {"template"}
    assert "14 shorter histories of them, 1 differ" in found["template"].detail


HEADER_IN_SPAN = (
    ("    {{- assistant_header -}}\n    {%- if message[", "    {%- if message["),
    ("      {%- generation -%}\n", "      {%- generation -%}\n{{- assistant_header -}}"),
)


def test_a_header_inside_the_generation_span_is_found(clinic):
    found = clinic.diagnose("sft", f"stages.sft.{clinic.template(*HEADER_IN_SPAN)}")
    assert failed(found) == {"mask"}
    assert "messages[1]: the template's generation span is '<|im_start|>assistant" in found["mask"].detail


def test_a_template_that_drops_tool_calls_is_found(clinic):
    found = clinic.diagnose(
        "sft", f"stages.sft.{clinic.template(('if calls and text', 'if text'), (') ~ calls -}}', ') -}}'))}"
    )
    assert failed(found) == {"rows"}
    assert "messages[1]: the chat template leaves the call of 'mul' out of the reply" in found["rows"].detail


def test_a_collate_that_trains_user_turns_is_found(clinic, monkeypatch):
    def unmasked(packs):
        batch = collate_packs(packs)
        return batch | {"labels": batch["input_ids"].masked_fill(batch["position_ids"] == 0, -100)}

    monkeypatch.setattr(sft, "collate_packs", unmasked)
    found = clinic.diagnose("sft")
    assert failed(found) == {"mask"}
    assert "10 documents; 10 differ" in found["mask"].detail


REPLY = '{%- generation -%}\n        {{- reply ~ "<|im_end|>" -}}'


def test_a_template_with_another_stop_token_makes_the_model_stop_there(clinic):
    other = clinic.template((REPLY, REPLY.replace("im_end", "end_of_text")))
    found = clinic.diagnose("sft", f"stages.sft.{other}")
    assert failed(found) == set()
    expected = "12 of 12 replies end with <|end_of_text|>, which trains in 12 of 12 (0 cut); the start checkpoint "
    assert found["stop token"].detail == f"{expected}stops at the ids [393], the trained model at [388, 393]"


def test_a_stop_token_that_does_not_train_is_found(clinic, monkeypatch):
    def endless(packs):
        batch = collate_packs(packs)
        return batch | {"labels": batch["labels"].masked_fill(batch["input_ids"] == 393, -100)}

    monkeypatch.setattr(sft, "collate_packs", endless)
    found = clinic.diagnose("sft")
    assert failed(found) == {"stop token", "mask"}
    assert "12 of 12 replies end with <|im_end|>, which trains in 0 of 12 (0 cut)" in found["stop token"].detail


def test_a_template_without_stop_token_is_found(clinic):
    spoilt = clinic.template((REPLY, REPLY.replace(' ~ "<|im_end|>"', "")))
    found = clinic.diagnose("sft", f"stages.sft.{spoilt}")
    assert failed(found) == {"rows", "stop token"}
    assert "0 of 12 replies end with a control token" in found["stop token"].detail


@pytest.mark.parametrize("stage", ["sft", "apo"])
def test_a_start_that_stops_elsewhere_is_no_fault_of_the_stage(clinic, stage):
    file = clinic.start / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7}))
    found = clinic.diagnose(stage)
    assert failed(found) == set()
    assert "stops at the ids [7], the trained model at [393, 7]" in found["stop token"].detail


def test_control_tokens_that_users_may_write_are_found(clinic, monkeypatch):
    def parse_all(tokenizer, messages, **options):
        ids = tokenizer.encode(render(tokenizer, messages, **options), add_special_tokens=False)
        return Encoded(ids, [0] * len(ids), 0)

    monkeypatch.setattr(doctor_text, "encode", parse_all)
    found = clinic.diagnose("sft")
    assert failed(found) == {"control tokens"}
    assert (
        "5 of 5 control tokens" in found["control tokens"].detail and "<|im_start|>" in found["control tokens"].detail
    )


def blind(num_tokens, document_lengths=None, pair_lengths=None):
    """find_segments that takes each pair for one document, and all documents for one."""
    ends = [*accumulate(map(sum, pair_lengths))] if pair_lengths else [num_tokens]
    return tuple(Segment(range(a, b), range(0)) for a, b in pairwise([0, *ends]))


def test_an_attention_that_leaks_across_documents_is_found(clinic, monkeypatch):
    monkeypatch.setattr(attention, "find_segments", blind)
    found = clinic.diagnose("sft")
    assert failed(found) == {"packing"}
    assert found["accumulation"].status == "skip" and "see packing" in found["accumulation"].detail
    off = float(re.search(r"largest gradient difference (\S+) of", found["packing"].detail).group(1))
    assert off > 1e-2


def test_a_loss_that_each_pass_divides_for_itself_is_found(clinic, monkeypatch):
    pass_loss = sft.PackTrainer.pass_loss

    def alone(self, model, batch, counts, totals):
        return pass_loss(self, model, batch, counts, torch.tensor(self.count(batch)))

    monkeypatch.setattr(sft.PackTrainer, "pass_loss", alone)
    found = clinic.diagnose("sft")
    assert failed(found) == {"accumulation"}
    one, many = map(
        float, re.search(r"loss (\S+) in 1 pass of 10 packs, (\S+) in 10", found["accumulation"].detail).groups()
    )
    assert many == pytest.approx(10 * one, rel=0.01)


def test_a_checkpoint_with_another_template_is_found(clinic):
    (clinic.start / "chat_template.jinja").write_text(load_template("chatml"))
    found = clinic.diagnose("sft", "stages.sft.allow_template_change=false")
    assert failed(found) == {"chat parity"}
    assert "10 of 10 sampled conversations render differently, the first" in found["chat parity"].detail
    meant = clinic.diagnose("sft", "stages.sft.allow_template_change=true")
    assert failed(meant) == set() and "allowed by allow_template_change" in meant["chat parity"].detail


def test_a_generation_prompt_that_training_did_not_see_is_found(clinic):
    spoilt = clinic.template(("{%- if add_generation_prompt -%}\n", "{%- if add_generation_prompt -%}\n  {{- ' ' -}}"))
    found = clinic.diagnose("sft", f"stages.sft.{spoilt}")
    assert failed(found) == {"chat parity"}
    assert "generation prompt before 0 of 14 replies" in found["chat parity"].detail


def spoil_weights(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights["model.embed_tokens.weight"])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def test_control_tokens_with_one_embedding_are_found(clinic):
    start, end = AutoTokenizer.from_pretrained(clinic.start).convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    spoil_weights(clinic.start, lambda weight: weight[start].copy_(weight[end]))
    found = clinic.diagnose("sft")
    assert failed(found) == {"vocabulary"}
    assert "2 with an embedding that another one has, too (<|im_start|>, <|im_end|>)" in found["vocabulary"].detail
    spoil_weights(clinic.start, lambda weight: weight[start].zero_())
    assert "1 with an embedding of 0 (<|im_start|>)" in clinic.diagnose("sft")["vocabulary"].detail


def test_a_token_without_embedding_is_found(clinic):
    tokenizer = AutoTokenizer.from_pretrained(clinic.start)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(clinic.start)
    found = clinic.diagnose("sft")
    assert failed(found) == {"vocabulary"}
    assert "highest id 400, 400 embeddings" in found["vocabulary"].detail


def test_rows_that_would_be_refused_for_their_length_are_found(clinic):
    found = clinic.diagnose("sft", "stages.sft.max_seq_len=100", "stages.sft.overlong=refuse")
    assert failed(found) == {"lengths"}
    assert re.match(r"[1-9] of 10 sampled rows \(\d0%\) above max_seq_len=100, longest 1\d\d ", found["lengths"].detail)


# ---------------------------------------------------------------- faults of apo stages


def test_a_prompt_that_a_side_does_not_begin_with_is_found(clinic, monkeypatch):
    arrays = doctor_case.Case.arrays.fget

    def changed(case):
        return [
            pair | {"prompt_ids": pair["prompt_ids"][1:], "prompt_mask": pair["prompt_mask"][1:]}
            for pair in arrays(case)
        ]

    monkeypatch.setattr(doctor_case.Case, "arrays", property(changed))
    found = clinic.diagnose("apo")
    assert failed(found) == {"shared prompt"}
    assert "18 sides differ" in found["shared prompt"].detail


def test_a_header_in_the_scored_text_is_found(clinic):
    found = clinic.diagnose("apo", f"stages.apo.{clinic.template(*HEADER_IN_SPAN)}")
    assert failed(found) == {"pair mask"}
    assert "messages[1]: the template's generation span is '<|im_start|>assistant" in found["pair mask"].detail


def test_an_attention_that_shows_chosen_to_rejected_is_found(clinic, monkeypatch):
    monkeypatch.setattr(attention, "find_segments", blind)
    found = clinic.diagnose("apo")
    assert failed(found) == {"pairs"}
    assert float(re.search(r"difference of a token (\S+);", found["pairs"].detail).group(1)) > 1e-3


def test_a_wrong_loss_is_found(clinic, monkeypatch):
    right = ApoZero.values
    monkeypatch.setattr(ApoZero, "values", lambda *args: right(*args) + 0.25)
    found = clinic.diagnose("apo")
    assert failed(found) == {"reference loss"}
    assert "loss 1.250000, theory apo_zero 1.000000" in found["reference loss"].detail


def test_pairs_that_render_alike_are_found(clinic):
    same = [[ASK, {"role": "assistant", "content": text}] for text in ("42.", "<think>\nSix sevens.\n</think>\n42.")]
    row = {"chosen": same[0], "rejected": same[1], "chat_template_kwargs": NO_THINK}
    clinic.write("preference", [*pairs(), row])
    found = clinic.diagnose("apo")
    assert failed(found) == {"equal pairs"}
    assert (
        "1 of 10 sampled pairs" in found["equal pairs"].detail and "preference.jsonl:10" in found["equal pairs"].detail
    )


# ---------------------------------------------------------------- around the checks


def test_an_error_inside_a_check_is_its_fail(clinic, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(doctor_text, "vocabulary_hash", broken)
    found = clinic.diagnose("sft")
    assert failed(found) == {"chat parity"}
    assert found["chat parity"].detail == "RuntimeError: no such thing"


def test_a_large_model_on_a_cpu_is_run_for_few_rows_only(clinic, monkeypatch):
    monkeypatch.setattr(doctor_case, "HEAVY", 1000)
    found = clinic.diagnose("sft")
    assert failed(found) == set()
    assert {name for name, check in found.items() if check.status == "skip"} == {"packing", "accumulation"}
    assert "parameters on a CPU, above 1,000; use a GPU or at most 4 rows" in found["packing"].detail
    assert {check.status for check in clinic.diagnose("sft", rows=4).values()} == {"pass"}


def test_the_report_says_status_numbers_remedy_and_verdict():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(
        report(
            [
                Check("rows", "pass", "0 of 3"),
                Check("mask", "fail", "2 of 3", "mend it"),
                Check("packing", "skip", "no"),
            ]
        )
    )
    lines = [line.split() for line in console.export_text().splitlines()]
    assert lines == [
        ["pass", "rows", "0", "of", "3"], ["fail", "mask", "2", "of", "3"], ["remedy:", "mend", "it"],
        ["skip", "packing", "no"], ["1", "of", "3", "checks", "failed:", "mask;", "1", "skipped:", "packing"],
    ]  # fmt: skip
    assert exit_code([Check("mask", "fail", "", "x")]) == 1


def test_bad_input_is_one_line(healthy, tmp_path):
    lineage = healthy.lineage()
    with pytest.raises(UserError, match="stage=init of kind init trains nothing; doctor checks training stages"):
        diagnose(lineage, lineage.stages["init"])
    with pytest.raises(UserError, match="rows=0 is below 1"):
        diagnose(lineage, lineage.stages["sft"], rows=0)
    lineage = healthy.lineage(f"run_dir={tmp_path}")
    with pytest.raises(UserError, match="stage init is not finished"):
        diagnose(lineage, lineage.stages["sft"])
