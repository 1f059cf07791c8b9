"""The model card: what a model is, what it comes from, what it was trained on and how it scored. No claim beyond that.

It is written when a model is published and not when its stage ends, as the evaluation comes in between.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from smolpost.evaluation import results
from smolpost.files import MANIFEST, read_json
from smolpost.markdown import header, table
from smolpost.report.heat_map import DEPTH
from smolpost.stages.base import CHECKPOINT

USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

messages = [{{"role": "user", "content": "What is 12 + 30?"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True{think}
)
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```
"""
PLAIN_USE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = "{name}"
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

inputs = tokenizer("What is 12 + 30?", return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=256)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))
```

The tokenizer has no chat template.
"""
SETTINGS = (  # of a stage's configuration, where it has them
    "method", "engine", "loss", "beta", "sft_weight", "template", "max_seq_len", "packing", "global_batch_size",
    "learning_rate", "lr_scheduler", "warmup_ratio", "weight_decay", "num_epochs", "max_steps", "dtype", "average",
)  # fmt: skip
MEASURED = ("steps", "epochs", "loss_first", "loss_last", "seconds", "num_processes", "device", "precision")


class Ancestor(NamedTuple):
    """A model that another one comes from, or that model itself.

    Attributes:
        name: Of the stage, or "checkpoint" for the start of the pipeline.
        key: Of its result; for a checkpoint of the Hub ID@COMMIT.
        manifest: {} where its folder is not here.
    """

    name: str
    key: str
    manifest: dict[str, Any]

    @property
    def hub_id(self) -> str | None:
        return self.key.partition("@")[0] if "@" in self.key else None

    @property
    def made_from(self) -> str:
        """Its parents, and what they count in a merge."""
        weights = self.manifest.get("weights") or {}
        report = self.manifest.get("report") or {}
        mixed = report.get("merge", report).get("inputs")
        if isinstance(mixed, dict) and mixed.keys() == weights.keys():
            weights = mixed
        if len(weights) == 1:
            return next(iter(weights))
        return ", ".join(f"{name} x {w:.6g}" if isinstance(w, int | float) else name for name, w in weights.items())


def model_card(folder: Path, manifest: Mapping[str, Any], target: str | None = None) -> str:
    """The card in Markdown, with the header that the Hub reads.

    Args:
        folder: Of a checkpoint; its parents' folders and its evaluation are looked for beside it.
        manifest: Of the folder.
        target: The name by which readers load it; None: they fill it in.
    """
    config = read_json(folder / "config.json")
    lineage = list(ancestors(folder, manifest))
    name = " ".join(filter(None, [manifest.get("pipeline"), manifest.get("stage")])) or folder.name
    parts = [
        _header(lineage, manifest),
        f"# {name}\n\n{_what(config, manifest)} Its texts can be wrong.\n",
        _use(folder, target or "THIS_FOLDER_OR_ID"),
        _lineage(lineage),
        _data(lineage),
        _settings(manifest),
        _evaluation(folder, manifest),
        _not_checked(folder, manifest, lineage),
        _provenance(manifest),
    ]
    return "\n".join(part for part in parts if part)


def ancestors(folder: Path, manifest: Mapping[str, Any]) -> Iterator[Ancestor]:
    """The model, its parents, theirs and so on, each once; as far as their folders are here."""
    todo = [Ancestor(manifest.get("stage", folder.name), manifest["key"], dict(manifest))]
    seen = set()
    while todo:
        model = todo.pop(0)
        if model.key in seen:
            continue
        seen.add(model.key)
        yield model
        parents = model.manifest.get("parents") or {}
        for name in model.manifest.get("weights") or {}:
            key = parents.get(name, "")
            own = {} if name == CHECKPOINT else read_json(folder.parent / f"{name}-{key}" / MANIFEST)
            todo.append(Ancestor(name, key, own))


def _header(lineage: list[Ancestor], manifest: Mapping[str, Any]) -> str:
    bases = [model.hub_id for model in lineage if model.hub_id]
    content: dict[str, Any] = {"license": "unknown"}
    if bases:
        content["base_model"] = bases[0] if len(bases) == 1 else bases
    tags = ["smolpost", *([manifest["kind"]] if manifest.get("kind") else [])]
    return header(content | {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags})


def _what(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    architecture = ", ".join(config.get("architectures") or [config.get("model_type", "unknown")])
    text = f"A model of architecture `{architecture}` in {config.get('dtype', 'unknown precision')}"
    if "stage" not in manifest:
        return f"{text}. Its files were checked by smolpost; how it was trained is not recorded."
    seed = "" if manifest.get("seed") is None else f" and seed {manifest['seed']}"
    return (
        f"{text}, made by stage `{manifest['stage']}` of kind `{manifest['kind']}`{seed} in the smolpost pipeline "
        f"`{manifest['pipeline']}`."
    )


def _use(folder: Path, name: str) -> str:
    if not (folder / "tokenizer_config.json").is_file():
        return "## Use\n\nThe checkpoint has no tokenizer; load it with that of the model that it comes from.\n"
    file = folder / "chat_template.jinja"
    if not file.is_file():
        return PLAIN_USE.format(name=name)
    template = file.read_text(encoding="utf-8")
    if "enable_thinking" not in template:
        return USE.format(name=name, think="")
    text = USE.format(name=name, think=", enable_thinking=True")
    text += "\nWith `enable_thinking=False` the model answers without reasoning first."
    if "/no_think" in template:
        text += " `/think` and `/no_think` in the system message do the same."
    return f"{text}\n"


def _lineage(lineage: list[Ancestor]) -> str:
    rows = []
    for model in lineage:
        at_hub = f"checkpoint {model.hub_id} of the Hub" if model.hub_id else "checkpoint from elsewhere"
        kind = model.manifest.get("kind") or (at_hub if model.name == CHECKPOINT else "its folder is not here")
        rows.append([model.name, kind, model.key, model.made_from or "-"])
    return "## Lineage\n\n" + table(["model", "kind", "key", "made from"], rows)


def _data(lineage: list[Ancestor]) -> str:
    """The rows of each training in the lineage."""
    rows = [
        [model.name, source, *(_number(found.get(key)) for key in ("rows_kept", "tokens_read", "tokens_trained"))]
        for model in lineage
        for source, found in _sources(model.manifest).items()
    ]
    if not rows:
        return ""
    heads = ["stage", "source", "rows", "tokens", "trained tokens"]
    return (
        f"## Data\n\n{table(heads, rows)}\nNumbers are of one pass over the rows. Trained tokens are those of the "
        "model's own turns.\n"
    )


def _sources(manifest: Mapping[str, Any]) -> dict[str, Any]:
    return ((manifest.get("report") or {}).get("data") or {}).get("sources") or {}


def _settings(manifest: Mapping[str, Any]) -> str:
    config, report = manifest.get("config") or {}, manifest.get("report") or {}
    stated = {name: config[name] for name in SETTINGS if config.get(name) is not None}
    if (lora := config.get("lora") or {}).get("r"):
        stated |= {f"lora.{name}": lora[name] for name in ("r", "alpha", "dropout") if name in lora}
    stated |= {name: report[name] for name in MEASURED if report.get(name) is not None}
    if not stated:
        return ""
    rows = [[name, f"{value:.6g}" if isinstance(value, float) else value] for name, value in stated.items()]
    return "## Settings\n\n" + table(["name", "value"], rows)


def _evaluation(folder: Path, manifest: Mapping[str, Any]) -> str:
    rows = []
    for task, found in read_json(_scores(folder)).items():
        for metric, score in found["scores"].items():
            if DEPTH not in metric:
                interval = "-" if score.get("low") is None else f"{score['low']:.3f} to {score['high']:.3f}"
                rows.append([task, metric, f"{score['value']:.3f}", interval, _number(score.get("n"))])
    if not rows:
        return "## Evaluation\n\nNo evaluation of this model is recorded.\n"
    text = "## Evaluation\n\n" + table(["task", "metric", "score", "95% interval", "n"], rows)
    if "picked" in (manifest.get("report") or {}):
        text += (
            "\nThe merge was chosen by an evaluation. Scores on the prompts that chose it are biased upward; "
            "`sweep.json` or `greedy.json` names those tasks.\n"
        )
    return text


def _scores(folder: Path) -> Path:
    return folder.parent / "evaluations" / folder.name / results.SCORES


def _not_checked(folder: Path, manifest: Mapping[str, Any], lineage: list[Ancestor]) -> str:
    lines = [
        "The licences of the base model and of the data: whoever publishes this model has to check them.",
        "Safety, bias, and whether the model repeats its training data.",
        *([] if _scores(folder).is_file() else ["Quality: no evaluation is recorded."]),
    ]
    absent = [model.name for model in lineage if not model.manifest and model.name != CHECKPOINT]
    if absent:
        lines.append(f"How {', '.join(absent)} was made: only the key is recorded here.")
    if "stage" not in manifest or any(model.name == CHECKPOINT and not model.hub_id for model in lineage):
        lines.append("How the checkpoint at the start was trained: it came from elsewhere.")
    return "## Not checked\n\n" + "".join(f"- {line}\n" for line in lines)


def _provenance(manifest: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in (manifest.get("versions") or {}).items())
    return (
        f"## Provenance\n\nMade with {versions}.\n\n`manifest.json` holds the settings, keys, seeds, the log and the "
        "SHA-256 of each file. Absolute paths of the machine are shortened to their last part in it.\n"
    )


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "-"
