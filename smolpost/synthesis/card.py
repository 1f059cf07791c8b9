"""The dataset card: what the rows are, how they were made, and how to load them. The Hub shows it as README.md."""

from collections.abc import Mapping
from typing import Any

from smolpost.markdown import header, replace_section, split_header, table
from smolpost.synthesis.row_table import PROVENANCE_ROWS, ROWS

LOADING = """## Load

```python
from datasets import load_dataset

rows = load_dataset("THIS_FOLDER_OR_ID", split="train")
```

The columns are those of SmolTalk2. `tools` and the arguments of tool calls are JSON texts.
"""
SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
PROVENANCE_TEXT = """## Provenance

`{file}` has one row per prompt, also for prompts that did not become a row. `id` joins it with the rows.

| column | content |
|---|---|
| `id`, `source` | of the prompt |
| `row_hash` | SHA-256 of the prompt's row as it was read |
| `status`, `reason`, `error` | accepted, filtered (and why) or failed (and why) |
| `verdicts` | what each filter said: `filter`, `passed`, `reason`, `score` |
| `replies` | of each reply: `role`, `sample` and `turn`; `model`, `revision`, `server`, `server_version`, `template_hash` and `sampling` of its teacher; `seed`; `finish_reason`; `prompt_tokens` and `completion_tokens`; `attempts` and `seconds`; `raw`, the message as the server gave it |
"""  # noqa: E501


def card(report: Mapping[str, Any]) -> str:
    """The card in Markdown, with a YAML header that says which file holds what.

    Args:
        report: As `results.write` returns it.
    """
    facts = report["facts"]
    parts = [
        _header(report["accepted"]),
        f"# {facts['name']}\n\n{report['accepted']:,} rows, made from {report['prompts']:,} prompts by a stage of kind "
        f"`{facts['kind']}` of smolpost. Replies are texts of language models and can be wrong.\n",
        LOADING,
        _counts(report),
        _lengths(report["lengths"]),
        _teachers(report),
        f"## Settings\n\n{_settings('Job', facts['job'])}\n{_settings('Filters', facts['filters'])}",
    ]
    parts += [
        PROVENANCE_TEXT.format(file=PROVENANCE_ROWS),
        "## Licence\n\nNone is stated here. The prompts keep the licences of their sources, and the terms of the "
        "teachers' licences apply to their replies. Whoever publishes the rows has to check both and add `license` to "
        "the header.\n",
    ]
    return "\n".join(parts)


def without_provenance(text: str) -> str:
    """A card, also one that its owner has changed, for rows that are published without their provenance."""
    text = replace_section(text, "Provenance", "")
    content, body = split_header(text)
    if not content:
        return text
    content["configs"] = [entry for entry in content.get("configs", []) if entry.get("data_files") != PROVENANCE_ROWS]
    return header(content) + body


def _header(num_rows: int) -> str:
    files = {"default": ROWS, "provenance": PROVENANCE_ROWS}
    size = next((name for limit, name in SIZES if num_rows < limit), "n>10M")
    return header(
        {
            "configs": [{"config_name": name, "data_files": file} for name, file in files.items()],
            "tags": ["synthetic", "smolpost"],
            "size_categories": [size],
        }
    )


def _counts(report: Mapping[str, Any]) -> str:
    lines = [
        [name, entry["prompts"], entry["accepted"], sum(entry["filtered"].values()), entry["failed"], _share(entry)]
        for name, entry in [*report["sources"].items(), ("all", report)]
    ]
    text = "## Counts\n\n" + table(["source", "prompts", "accepted", "filtered", "failed", "accepted share"], lines)
    if report["filtered"]:
        text += "\n" + table(["filtered by", "prompts"], report["filtered"].items())
    return text


def _lengths(lengths: Mapping[str, Any]) -> str:
    """Tokens of accepted and dropped replies, sides of pairs, labels."""
    lines = [
        [role, kind, found[kind]["count"], *(_rounded(found[kind][name]) for name in ("mean", "median"))]
        for role, found in lengths["replies"].items()
        for kind in ("accepted", "dropped")
    ]
    text = "## Lengths\n\n" + table(["teacher", "replies", "number", "mean tokens", "median tokens"], lines)
    if pairs := lengths["pairs"]:
        text += (
            f"\nThe chosen side is longer in {pairs['chosen_longer']:.0%} of {pairs['count']:,} pairs (means: about "
            f"{pairs['chosen']:,.0f} and {pairs['rejected']:,.0f} tokens, at 4 bytes a token).\n"
        )
    if answers := lengths["answers"]:
        text += f"\n{answers['right']:.1%} of {answers['labelled']:,} answers are labelled as right; the others stay.\n"
    return text


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _share(entry: Mapping[str, Any]) -> str:
    return f"{entry['accepted'] / max(1, entry['prompts']):.1%}"


def _teachers(report: Mapping[str, Any]) -> str:
    text = "## Teachers\n"
    for role, teacher in report["facts"]["teachers"].items():
        counts = report["teachers"].get(role, {})
        identity = {name: value for name, value in teacher.items() if name != "sampling"}
        text += f"\n{_settings(role, identity | teacher.get('sampling', {}) | counts)}"
    return text


def _settings(title: str, settings: Mapping[str, Any]) -> str:
    stated = [(key, value) for key, value in settings.items() if value is not None]
    return f"### {title}\n\n{table(['key', 'value'], stated)}"
