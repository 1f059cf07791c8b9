"""Small prepared folders by the contract of `prepare`, made by hand: what they hold is known without the code."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from smolpost.chat.fates import MASKED, Fate
from smolpost.chat.tokenizer import build_tokenizer
from smolpost.data.dataset_folder import write_dataset
from smolpost.data.report import new_source, percentiles, write_report

HOSTILE = "</script><img src=x onerror=\"document.title='owned'\"> {{ 7*7 }} &lt; \u202eabc \x1b[31mred\x00"
HOSTILE_SOURCE = "<b onclick=\"document.title='owned'\">evil</b> & 'co'"
HOSTILE_PATH = 'data/"><script>document.title="owned"</script>.jsonl'
SMILE = "Grüße 😀\tdone"  # an emoji of several tokens


@dataclass
class Made:
    """A row and its tokens: one part for a document; prompt, chosen and rejected for a pair."""

    source: str
    path: str
    number: int
    think: bool
    parts: list[list[tuple[Fate, str]]]
    ids: list[np.ndarray] = field(default_factory=list)
    fates: list[np.ndarray] = field(default_factory=list)


def chat(question: str, reply: str, reasoning: str = "", system: str = "", tool: str = "") -> list[tuple[Fate, str]]:
    """Segments of a conversation."""
    start = "<|im_start|>"
    segments = (
        [(Fate.TEMPLATE, f"{start}system\n"), (Fate.SYSTEM, system), (Fate.TEMPLATE, "<|im_end|>\n")] if system else []
    )
    segments += [(Fate.TEMPLATE, f"{start}user\n"), (Fate.USER, question), (Fate.TEMPLATE, "<|im_end|>\n")]
    if tool:
        segments += [
            (Fate.TEMPLATE, f"{start}assistant\n"),
            (Fate.REPLY, "Let me look."),
            (Fate.TEMPLATE, "<|im_end|>\n"),
        ]
        segments += [(Fate.TEMPLATE, f"{start}tool\n"), (Fate.TOOL, tool), (Fate.TEMPLATE, "<|im_end|>\n")]
    segments += [(Fate.TEMPLATE, f"{start}assistant\n")]
    if reasoning:
        segments += [(Fate.REASONING, f"<think>\n{reasoning}\n</think>\n")]
    return [*segments, (Fate.TRAINED, f"{reply}<|im_end|>"), (Fate.TEMPLATE, "\n")]


def sft_packs() -> list[list[Made]]:
    everyday, tools = "data/everyday.jsonl", "data/tools.jsonl"
    return [
        [
            Made(
                "everyday", everyday, 1, False, [chat("What is 2+2?", "It is 4.\n\n    so  there ", system="Be kind.")]
            ),
            Made(
                "tools", tools, 1, True, [chat("Weather?", SMILE, reasoning="It rains\nin Rome.", tool='{"rain": 1}')]
            ),
        ],
        [Made(HOSTILE_SOURCE, HOSTILE_PATH, 7, False, [chat(HOSTILE, f"No. {HOSTILE}")])],
        [
            Made("everyday", everyday, 3, True, [chat("Why?", "<think>\nhm\n</think>\nBecause.")]),
            Made("everyday", everyday, 4, False, [chat("And?", "Nothing more.")]),
            Made("tools", tools, 2, True, [chat("Snow?", "Snowflakes fall.", reasoning="Cold.", tool="[]")]),
        ],
    ]


def pairs() -> list[Made]:
    made = []
    for number, (question, think) in enumerate([("What is 2+2?", True), (HOSTILE, False)], start=1):
        block = "<think>\nAdd.\n</think>\n" if think else ""
        prompt, chosen = chat(question, "")[:-2], f"{block}It is four.<|im_end|>"
        shared, rejected = (Fate.TRAINED, "The "), f"answer is {HOSTILE}<|im_end|>"
        parts = [[*prompt, shared], [(Fate.TRAINED, chosen), (Fate.TEMPLATE, "\n")], [(Fate.TRAINED, rejected)]]
        made.append(Made("judged", "data/pairs.jsonl", number, think, parts))
    return made


def tokenizer():
    return build_tokenizer(["What is it? It is the answer."] * 3, kind="bpe", vocab_size=330, template="smollm3")


def write_sft(folder: Path, packs: list[list[Made]] | None = None, words=None) -> list[list[Made]]:
    """A prepared folder of an sft stage; row 2 of everyday.jsonl was dropped. Returns its packs, tokenized."""
    folder.mkdir()
    packs = sft_packs() if packs is None else packs
    made = [document for pack in packs for document in pack]
    _tokenize(folder, made, words)
    columns = {
        "input_ids": [np.concatenate([d.ids[0] for d in pack]) for pack in packs],
        "fates": [np.concatenate([d.fates[0] for d in pack]) for pack in packs],
        "seq_lengths": [np.array([len(d.ids[0]) for d in pack]) for pack in packs],
        "rows": [np.array([made.index(d) for d in pack]) for pack in packs],
    }
    _write_columns(folder, columns)
    num_tokens = sum(map(len, columns["input_ids"]))
    packed = {"packs": len(packs), "tokens_per_pack": num_tokens / len(packs), "fill_percent": 90.0}
    _write_rest(folder, made, {"kind": "sft", "max_seq_len": 512}, packed)
    return packs


def write_apo(folder: Path) -> list[Made]:
    """A prepared folder of an apo stage; returns its pairs, tokenized."""
    folder.mkdir()
    made = pairs()
    _tokenize(folder, made, None)
    columns = {"rows": [np.array([i]) for i in range(len(made))]}
    for part, name in enumerate(("prompt", "chosen", "rejected")):
        columns[f"{name}_ids"] = [pair.ids[part] for pair in made]
        columns[f"{name}_fates"] = [pair.fates[part] for pair in made]
        columns[f"{name}_mask"] = [(pair.fates[part] == Fate.TRAINED) for pair in made]
    _write_columns(folder, columns)
    num_tokens = sum(len(ids) for pair in made for ids in pair.ids)
    _write_rest(
        folder, made, {"kind": "apo", "max_seq_len": 512}, {"pairs": len(made), "tokens_per_pair": num_tokens / 2}
    )
    return made


def _tokenize(folder: Path, made: list[Made], words) -> None:
    words = words or tokenizer()
    words.save_pretrained(folder / "tokenizer")
    for row in made:
        for nth, segments in enumerate(row.parts):
            ids = [words.encode(text, add_special_tokens=False) for _, text in segments]
            fates = np.repeat([fate for fate, _ in segments], [len(i) for i in ids]).astype(np.int8)
            if nth == 0:
                fates[0] = Fate.FIRST
            row.ids.append(np.concatenate(ids).astype(np.int32))
            row.fates.append(fates)


def _write_columns(folder: Path, columns: dict[str, list[np.ndarray]]) -> None:
    types = {name: "int8" if name.endswith(("mask", "fates")) else "int32" for name in columns}
    num_rows = len(columns["rows"])
    chunks = [  # of two rows, so that places have to count across record batches
        {
            name: (np.concatenate(rows[i : i + 2]), np.array([len(row) for row in rows[i : i + 2]]))
            for name, rows in columns.items()
        }
        for i in range(0, num_rows, 2)
    ]
    write_dataset(folder, types, chunks)


def _write_rest(folder: Path, made: list[Made], settings: dict, totals: dict) -> None:
    kept = [
        {
            "source": d.source,
            "path": d.path,
            "number": d.number,
            "tokens": sum(map(len, d.ids)),
            "think": d.think,
            "dropped": "",
        }
        for d in made
    ]
    lost = {"source": made[0].source, "path": made[0].path, "number": 2 if "everyday" in made[0].path else 99}
    rows = [*kept, lost | {"tokens": 600, "think": False, "dropped": "overlong"}]
    schema = pa.schema(
        {"source": pa.string(), "path": pa.string(), "number": pa.int64(), "tokens": pa.int64(), "think": pa.bool_()}
        | {"dropped": pa.string()}
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), folder / "rows.parquet")
    sources = {
        name: _entry([row for row in made if row.source == name]) for name in dict.fromkeys(d.source for d in made)
    }
    first = sources[made[0].source]
    first["rows_read"], first["tokens_read"] = first["rows_read"] + 1, first["tokens_read"] + 600
    first["tokens_dropped"], first["dropped"] = 600, {"overlong": 1}
    write_report(folder, settings, sources, **totals)
    manifest = {"kind": "prepared", "key": "0123456789ab", "template_hash": "feedfeedfeedfeed"}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _entry(rows: list[Made]) -> dict:
    fates = np.concatenate([fates for row in rows for fates in row.fates])
    masked = {name: int((fates == fate).sum()) for fate, name in MASKED.items()}
    entry = new_source() | {
        "rows_read": len(rows),
        "rows_kept": len(rows),
        "think_rows": sum(row.think for row in rows),
        "no_think_rows": sum(not row.think for row in rows),
        "tokens_read": len(fates),
        "tokens_trained": int((fates == Fate.TRAINED).sum()),
        "tokens_masked": int((fates != Fate.TRAINED).sum()),
        "tokens_shared": sum(len(row.ids[0]) for row in rows if len(row.ids) > 1),
        "masked": masked,
        "length_percentiles": percentiles([sum(map(len, row.ids)) for row in rows]),
    }
    return entry
