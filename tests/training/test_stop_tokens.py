"""A trained model stops where its trained turns ended, in stock transformers, whatever its base stopped at."""

import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import AutoTokenizer, LogitsProcessor, LogitsProcessorList
from transformers.models.smollm3 import SmolLM3ForCausalLM as StockSmolLM3

from smolpost.chat.fates import Fate
from smolpost.chat.render import load_template
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.errors import UserError
from smolpost.model import SmolLM3Config, SmolLM3ForCausalLM
from smolpost.stages.preference import APOStage
from smolpost.stages.sft import SFTStage
from smolpost.training.environment import Environment
from smolpost.training.settings import LoRA
from smolpost.training.stop_tokens import change, stop_tokens, trained_ends
from smolpost.training.train import train
from tests.prepared import prepared

CPU = Environment(rank=0, world_size=1, local_world_size=1, use_cpu=True, bf16=False)
TEXT_END, TURN_END, CALL_END, OTHER_END = "<|end_of_text|>", "<|im_end|>", "<|eom|>", "<|eot|>"
# Ends tool calls and answers with tokens of their own, and marks nothing.
TWO_ENDS = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}"
    "{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}<|eom|>{% else %}<|eot|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    """A base model's: it ends with the end of a text, and has the tokens of chats."""
    tokenizer = build_tokenizer(["abc"], kind="char", vocab_size=256, template="smollm3")
    tokenizer.add_special_tokens({"additional_special_tokens": [CALL_END, OTHER_END]})
    tokenizer.eos_token = TEXT_END
    return tokenizer


@pytest.fixture
def start(tokenizer, tmp_path):
    return written(tokenizer, tmp_path / "start")


def written(tokenizer, folder, **fields) -> Path:
    """A base checkpoint whose files all say that it stops at its tokenizer's eos_token."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": 3, "eos_token_id": tokenizer.eos_token_id}
    config = SmolLM3Config(**shape, num_key_value_heads=1, vocab_size=len(tokenizer), **ids | fields)
    model = SmolLM3ForCausalLM(config)
    model.generation_config.update(do_sample=True, top_p=0.9)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def settings(**changes):
    shared = dict(init_from="x", data="y", max_seq_len=600, learning_rate=1e-3, global_batch_size=2, max_steps=2)
    return {**shared, "num_workers": 1, "report_to": [], "activation_checkpointing": "none", **changes}


def chat(*replies, **more):
    turns = []
    for i, reply in enumerate(replies):
        turns += [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": reply}]
    return {"messages": turns, "chat_template_kwargs": {"enable_thinking": False}, **more}


def pair(chosen, rejected):
    return {"chosen": chat(chosen)["messages"], "rejected": chat(rejected)["messages"]}


def template(tmp_path, text):
    (tmp_path / "own.jinja").write_text(text)
    return str(tmp_path / "own.jinja")


def ends(tokenizer, tmp_path, stage, rows):
    """(turns, texts) by the names of the tokens that end them."""
    tokenizer.chat_template = load_template(stage.template)
    dataset, _ = prepared(stage, rows, tokenizer, tmp_path)
    found = trained_ends(stage, dataset, tokenizer)
    return [{i if i is None else tokenizer.convert_ids_to_tokens(i): n for i, n in c.items()} for c in found]


# ---------------------------------------------------------------- which tokens end what trains


def test_every_turn_of_a_chat_and_every_text_counts(tokenizer, tmp_path):
    rows = [chat("a", "b"), chat("c"), {"text": "abc"}, {"text": "cba"}, {"text": "a<|im_end|>b"}]
    assert ends(tokenizer, tmp_path, SFTStage(**settings()), rows) == [{TURN_END: 3}, {TEXT_END: 3}]


@pytest.mark.parametrize("packing", ["bfd", "wrapped", "none"])
@pytest.mark.parametrize("last", ["</think>", TURN_END])
def test_where_a_row_is_cut_is_no_end(tokenizer, tmp_path, packing, last):
    """Cut after a tag of the think block: a stop token that is none would end every reply there."""
    row = {"messages": chat("<think>\n" + "a" * 99 + "\n</think>\nb")["messages"]}
    tokenizer.chat_template = load_template("smollm3")
    ids = prepared(SFTStage(**settings()), [row], tokenizer, mkdir(tmp_path / "whole"))[0][0]["input_ids"]
    length = len(ids) - ids[::-1].index(tokenizer.convert_tokens_to_ids(last))
    stage = SFTStage(**settings(max_seq_len=length, packing=packing, overlong="truncate"))
    rest = {TURN_END: 1} if (packing, last) == ("wrapped", "</think>") else {}  # the next row goes on with the answer
    assert ends(tokenizer, tmp_path, stage, [row]) == [rest, {}]


def mkdir(folder):
    folder.mkdir()
    return folder


def test_reasoning_that_does_not_train_ends_nothing(tokenizer, tmp_path):
    row = {"messages": chat("<think>\na\n</think>\nb")["messages"]}
    assert ends(tokenizer, tmp_path, SFTStage(**settings(train_reasoning=False)), [row]) == [{TURN_END: 1}, {}]


def by_hand(tokenizer, *documents) -> Dataset:
    """Prepared rows of one document each: [(text, fate)]; the first token has its own fate."""
    rows = []
    for document in documents:
        pieces = [(tokenizer.encode(text, add_special_tokens=False), fate) for text, fate in document]
        ids = [i for piece, _ in pieces for i in piece]
        fates = [fate for piece, fate in pieces for _ in piece]
        rows.append({"input_ids": ids, "fates": [Fate.FIRST, *fates[1:]]})
    return Dataset.from_list(rows)


HEAD, ASKED = ("<user>", Fate.TEMPLATE), ("2+2?", Fate.USER)
REPLY = ("<assistant>", Fate.TEMPLATE)


def test_a_trained_line_break_after_the_stop_token_is_passed_over(tokenizer):
    turn = [HEAD, ASKED, REPLY, ("4<|im_end|>\n\n", Fate.TRAINED)]
    found = trained_ends(SFTStage(**settings()), by_hand(tokenizer, turn, turn + turn), tokenizer)
    assert found == ({tokenizer.convert_tokens_to_ids(TURN_END): 3}, {})


def test_the_end_of_reasoning_inside_a_turn_is_no_end(tokenizer):
    """harmony closes reasoning with a token of its own, and the template opens the answer."""
    turn = [REPLY, ("because<|eom|>", Fate.TRAINED), ("<final>", Fate.TEMPLATE), ("4<|eot|>", Fate.TRAINED)]
    rows = by_hand(tokenizer, [HEAD, ASKED, *turn, HEAD, ASKED, *turn], [HEAD, ASKED, *turn])
    found = trained_ends(SFTStage(**settings()), rows, tokenizer)
    assert found == ({tokenizer.convert_tokens_to_ids(OTHER_END): 3}, {})


def test_a_tag_of_the_reply_is_no_stop_token(tokenizer):
    rows = by_hand(tokenizer, [HEAD, ASKED, REPLY, ("<think>a</think>", Fate.TRAINED), ("\n", Fate.TEMPLATE)])
    assert trained_ends(SFTStage(**settings()), rows, tokenizer) == ({None: 1}, {})


def test_all_tokens_train_up_to_the_end_of_the_last_turn(tokenizer, tmp_path):
    assert ends(tokenizer, tmp_path, SFTStage(**settings(train_roles=["all"])), [chat("a", "b")]) == [{TURN_END: 1}, {}]


def test_the_chosen_side_of_a_pair_counts(tokenizer, tmp_path):
    rows = [pair("abc", "b"), pair("same start", "same")]
    assert ends(tokenizer, tmp_path, APOStage(**settings()), rows) == [{TURN_END: 2}, {}]


def test_a_pair_that_is_cut_says_nothing(tokenizer, tmp_path):
    tokenizer.chat_template = load_template("smollm3")
    rows = [pair("abc", "b")]
    row = prepared(APOStage(**settings()), rows, tokenizer, mkdir(tmp_path / "whole"))[0][0]
    length = len(row["prompt_ids"]) + len(row["chosen_ids"])
    stage = APOStage(**settings(max_seq_len=length - 1, overlong="truncate"))
    assert ends(tokenizer, tmp_path, stage, rows) == [{}, {}]


# ---------------------------------------------------------------- what the stage will say


def told(tokenizer, start, tmp_path, stage, rows):
    tokenizer.chat_template = load_template(stage.template)
    return stop_tokens("sft", stage, prepared(stage, rows, tokenizer, tmp_path)[0], start, tokenizer)


def ids_of(tokenizer, *names):
    return tokenizer.convert_tokens_to_ids(list(names))


def test_chats_move_the_eos_token_and_texts_do_not(tokenizer, start, tmp_path):
    stage = SFTStage(**settings())
    found = told(tokenizer, start, mkdir(tmp_path / "a"), stage, [{"text": "abc"}] * 4 + [chat("a")])
    assert (found.end, found.eos_token) == (*ids_of(tokenizer, TURN_END), TURN_END)  # the fewer, but the turn's
    assert found.generation == ids_of(tokenizer, TURN_END, TEXT_END)
    tokenizer.eos_token = TURN_END
    chats = written(tokenizer, tmp_path / "chats")
    found = told(tokenizer, chats, mkdir(tmp_path / "b"), stage, [{"text": "abc"}] * 4)
    assert (found.end, found.eos_token) == (None, TURN_END)
    assert found.generation == ids_of(tokenizer, TURN_END, TEXT_END)


def test_several_stop_tokens_of_a_foreign_template(tokenizer, start, tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    rows = [chat("a"), chat("b"), {"messages": [{"role": "user", "content": "f?"}, call]}]
    found = told(tokenizer, start, tmp_path, SFTStage(**settings(template=template(tmp_path, TWO_ENDS))), rows)
    assert found.generation == ids_of(tokenizer, OTHER_END, CALL_END, TEXT_END)
    assert found.report["trained"] == {OTHER_END: 2, CALL_END: 1}
    assert found.report["generation"]["before"] == ids_of(tokenizer, TEXT_END)


def test_ids_that_the_tokenizer_does_not_have_are_left_out(tokenizer, tmp_path):
    start = written(tokenizer, tmp_path / "start")
    (start / "generation_config.json").write_text(json.dumps({"eos_token_id": [128001]}))
    found = told(tokenizer, start, tmp_path, SFTStage(**settings()), [chat("a")])
    assert found.generation == ids_of(tokenizer, TURN_END)


def test_a_template_that_writes_the_eos_token_keeps_it(tokenizer, start, tmp_path):
    """Another eos_token would change what the template renders at inference."""
    text = TWO_ENDS.replace("{% if add_gen", "{% if not messages %}{{ eos_token }}{% endif %}{% if add_gen")
    found = told(tokenizer, start, tmp_path, SFTStage(**settings(template=template(tmp_path, text))), [chat("a")])
    assert (found.end, found.eos_token) == (*ids_of(tokenizer, OTHER_END), TEXT_END)


def test_turns_that_end_with_text_are_refused_before_training(tokenizer, start):
    """<|im_end|> of a template that the tokenizer does not know, say."""
    rows = by_hand(tokenizer, [HEAD, ASKED, REPLY, ("4[END]", Fate.TRAINED), ("\n", Fate.TEMPLATE)])
    with pytest.raises(UserError, match=r"stages\.sft: none of the 1 trained turns ends with a control token") as error:
        stop_tokens("sft", SFTStage(**settings()), rows, start, tokenizer)
    assert "\n" not in str(error.value)
    cut = SFTStage(**settings(overlong="truncate"))  # there a turn may have lost its end
    found = stop_tokens("sft", cut, rows, start, tokenizer)
    assert (found.end, found.generation) == (None, ids_of(tokenizer, TEXT_END))
    assert change("sft", found).startswith("stages.sft: no trained turn has an end; its model stops at its start ")


# ---------------------------------------------------------------- what the stage writes


class Forced(LogitsProcessor):
    """The model says these tokens, one after another, and then the first ones again."""

    def __init__(self, tokens, prompt):
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids, scores):
        scores = torch.full_like(scores, -100.0)
        scores[:, self.tokens[(input_ids.shape[1] - self.prompt) % len(self.tokens)]] = 0.0
        return scores


def stock_reply(folder, tokens):
    """What stock `generate` gives of a model that says these tokens over and over."""
    model = StockSmolLM3.from_pretrained(folder)
    forced = LogitsProcessorList([Forced(tokens, 2)])
    return model.generate(torch.tensor([[5, 6]]), max_new_tokens=12, logits_processor=forced)[0, 2:].tolist()


def trained(name, stage, rows, tokenizer, start, folder):
    tokenizer.chat_template = load_template(stage.template)
    prepared(stage, rows, tokenizer, mkdir(folder))
    (folder / "out").mkdir()
    report = train(
        name, stage, stage.method(), seed=1, start=start, prepared=folder / "rows", out=folder / "out",
        references=folder / "r", attn_implementation="packed", environment=CPU,
    )  # fmt: skip
    return folder / "out", report


def said(folder):
    """(eos_token_id of the config, of the generation config, the tokenizer's)."""
    config, generation = (json.loads((folder / f"{n}.json").read_text()) for n in ("config", "generation_config"))
    return config["eos_token_id"], generation["eos_token_id"], AutoTokenizer.from_pretrained(folder).eos_token


@pytest.mark.parametrize("lora", [0, 2])
def test_stock_generate_stops_where_the_trained_turns_end(tokenizer, start, tmp_path, capsys, lora):
    end, text_end = ids_of(tokenizer, TURN_END, TEXT_END)
    assert said(start) == (text_end, text_end, TEXT_END)
    assert stock_reply(start, [7, end, 8]) == [7, end, 8] * 4  # the base runs past the end of a turn
    stage = SFTStage(**settings(snapshot_steps=1, lora=LoRA(r=lora)))
    out, report = trained("sft", stage, [chat("a"), chat("b", "c"), chat("c")], tokenizer, start, tmp_path / "sft")
    for folder in (out, out / "snapshots" / "step-1"):
        assert said(folder) == (end, [end, text_end], TURN_END)
        assert stock_reply(folder, [7, end, 8]) == [7, end]
        assert stock_reply(folder, [7, 8, text_end]) == [7, 8, text_end]
        config, before = (json.loads((f / "config.json").read_text()) for f in (folder, start))
        changed = {key for key in config if config[key] != before.get(key)}
        assert changed - {"use_cache", "transformers_version"} <= {"eos_token_id", "bos_token_id"}
        generation = json.loads((folder / "generation_config.json").read_text())
        assert generation["top_p"] == 0.9 and generation["pad_token_id"] == tokenizer.pad_token_id
    assert report["stop_tokens"]["trained"] == {TURN_END: 4}
    line = f"eos_token_id=[{end}, {text_end}] (start checkpoint: [{text_end}]), its tokenizer eos_token={TURN_END} "
    assert line in capsys.readouterr().out


def test_pairs_and_a_stage_after_another_keep_what_is_right(tokenizer, tmp_path, capsys):
    tokenizer.pad_token = None
    stage, start = SFTStage(**settings()), written(tokenizer, tmp_path / "start")
    out, _ = trained("sft", stage, [chat("a"), chat("b", "c"), chat("c")], tokenizer, start, tmp_path / "sft")
    capsys.readouterr()
    after = AutoTokenizer.from_pretrained(out)
    apo, _ = trained("apo", APOStage(**settings()), [pair("a", "b"), pair("c", "a")], after, out, tmp_path / "apo")
    assert said(apo) == said(out)
    assert "eos_token" not in capsys.readouterr().out
    assert after.pad_token is None and json.loads((apo / "config.json").read_text())["pad_token_id"] is None
    texts, _ = trained("texts", stage, [{"text": "abc"}] * 3, after, apo, tmp_path / "texts")
    assert said(texts) == said(out)
