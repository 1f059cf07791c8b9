"""The start checkpoint's tokenizer is learned from the text that prepare renders."""

import json

import pytest
from transformers import AutoTokenizer

from smolpost import recipe
from smolpost.errors import UserError
from smolpost.pipeline import steps
from smolpost.pipeline.lineage import Lineage
from tests.small import SMALL

TEMPLATE = (
    "{{ bos_token + strftime_now('%Y') + '\n' }}"
    "{%- for m in messages %}{{ m.role + ': ' + m.content + eos_token + '\n' }}{%- endfor %}"
)
TURNS = [{"role": "user", "content": "Zwölf?"}, {"role": "assistant", "content": "Ja."}]


def made(tmp_path, template: str, kind: str):
    (file := tmp_path / "own.jinja").write_text(template)
    (rows := tmp_path / "rows.jsonl").write_text(json.dumps({"messages": TURNS}) + "\n")
    words = [
        f"+data.mine.sources.rows.path={rows}",
        "stages.init.tokenizer_data=[mine]",
        f"stages.init.template={file}",
    ]
    for name in ("mid", "sft", "preference"):
        (tmp_path / f"smoltalk2_{name}.jsonl").write_text("{}\n")
    words += [
        f"stages.init.tokenizer={kind}",
        f"stages.init.template={file}",
        f"data_root={tmp_path}",
        f"run_dir={tmp_path / 'runs'}",
    ]
    lineage = Lineage(
        recipe.load([*SMALL, *words, *(f"stages.{s}.allow_template_change=true" for s in ("sft", "apo"))])
    )
    return steps.make(lineage, lineage.stages["init"])


@pytest.mark.parametrize("kind", ["bpe", "char"])
def test_a_template_may_read_special_tokens_and_the_date(tmp_path, kind):
    tokenizer = AutoTokenizer.from_pretrained(made(tmp_path, TEMPLATE, kind))
    text = tokenizer.apply_chat_template(TURNS, tokenize=False)
    assert text.startswith("<|begin_of_text|>2") and text.count("<|im_end|>") == 2
    assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert "ö" in tokenizer.get_vocab() or kind == "bpe"


def test_a_row_that_the_template_refuses_is_named(tmp_path):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: 'persona' is undefined: the chat template reads it"):
        made(tmp_path, "{{ persona + messages[0].content }}", "bpe")
