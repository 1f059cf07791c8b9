"""mergekit's methods by name or by its YAML, behind the checks and the atomic output of the linear merge."""

import math
from functools import reduce
from pathlib import Path
from typing import Any

import torch

from smolpost.errors import UserError
from smolpost.files import workplace
from smolpost.merging import linear
from smolpost.merging.adapters import base_of, is_adapter
from smolpost.merging.build import Job, MethodResult, build
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.mergekit import mean
from smolpost.merging.mergekit.config import STOCHASTIC, check_config, check_filters, method_of
from smolpost.merging.mergekit.plan import planned, without_embedding
from smolpost.merging.mergekit.yaml_file import Document, entries, read_file
from smolpost.merging.preflight import ENGINES, WEIGHT_TOLERANCE, check_choice, check_out, check_request, check_values
from smolpost.merging.shards import SHARD_BYTES
from smolpost.merging.tokenizer import template_text, write_tokenizer
from smolpost.merging.verify import check_finite

TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def merge_method(
    method: str,
    inputs: list[tuple[str, Path, dict[str, Any]]],
    base: str,
    out: Path,
    dtype: str,
    *,
    parameters: dict[str, Any],
    base_model: str | None = None,
    seed: int = 0,
    allow_template_change: bool = False,
    no_tokenizer: bool = False,
    hash_weights: bool = True,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the merge of checkpoints by one of mergekit's methods to a new folder, computed in fp32.

    The weights are bit for bit those of `mergekit.merge.run_merge` with dtype float32 and out_dtype `dtype`.

    Args:
        method: mergekit's name, e.g. slerp or ties. Its linear divides by the sum of weights unless normalize=False.
        inputs: Name for messages, checkpoint folder (a full model or a LoRA adapter) and mergekit's parameters of
            each: {"weight": 0.5, "density": 0.6}. A value is a number, a gradient (a list spread over the layers) or
            a list of {"filter": part of a tensor's name, "value": ...}.
        base: Name of the input whose config, tokenizer and chat template the result has.
        out: Result folder; empty or absent.
        dtype: "float32", "bfloat16" or "float16", of the written weights.
        parameters: mergekit's parameters of the merge, and defaults for the inputs' parameters: {"t": 0.4}.
        base_model: Name of the input that differences are taken from, or slerp's t = 0; karcher, linear take none.
        seed: mergekit's random_seed, of the methods that draw numbers (dare, della, arcee_fusion).
        allow_template_change: Merge inputs whose chat templates differ; the result has the base's.
        no_tokenizer: Merge models without comparing tokenizers, which they need not have; the result has none.
        hash_weights: Keep the SHA-256 of every input and output weight file in the manifest.
        threads: That hash and sync files, at most; all cores, eight at most, by default.
        shard_bytes: Of weights per written file.
    Returns:
        `method`, `inputs` (name -> its parameters), `base`, `base_model`, `dtype`, `compute_dtype`, `seed` (None where
        nothing is drawn), `config` (mergekit's, with names for folders), `resolved` (parameters as mergekit applied
        them: for each set of tensors that share them `tensors`, `parameters` and `inputs`; for linear also
        `normalized_weights`), `num_tensors`, `num_parameters`, `max_position_embeddings`, `read_bytes`,
        `written_bytes`, `seconds`.
    Raises:
        UserError: The method, its parameters or the inputs are not valid; nothing is written.
        OSError: For example, the disk is full; nothing is left behind.
    """
    names = [name for name, _, _ in inputs]
    if base_model is not None and base_model not in names:
        raise UserError(f"merge base_model='{base_model}' is not among the inputs {', '.join(names)}; add it")
    if base_model is not None and method_of(method).spec.contract.base == "ignored":
        raise UserError(f"merge method {method} starts from no model; drop base_model='{base_model}'")
    config = {
        "merge_method": method,
        "models": [{"model": name, "parameters": own} if own else {"model": name} for name, _, own in inputs],
        "base_model": base_model,
        "parameters": parameters,
        "dtype": "float32",
        "out_dtype": dtype,
    }
    unused = check_config(config)
    if unused:
        raise UserError(f"merge {unused[0]}; drop it")
    checkpoints = [Checkpoint(name, Path(folder)) for name, folder, _ in inputs]
    vocabulary = "none" if no_tokenizer else "equal"
    job = Job(checkpoints, base, Path(out), dtype, allow_template_change, hash_weights, threads, vocabulary)
    return _merge(config, job, seed, shard_bytes)


def merge_yaml(
    config_file: Path,
    out: Path,
    folders: dict[str, Path] | None = None,
    *,
    base: str | None = None,
    engine: str = "mergekit",
    seed: int | None = None,
    allow_template_change: bool = False,
    no_tokenizer: bool = False,
    hash_weights: bool = True,
    threads: int | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> dict[str, Any]:
    """Write the merge that a mergekit YAML file states to a new folder.

    The weights are bit for bit those of the `mergekit-yaml` command with --random-seed `seed`; docs/merging.md lists
    the exceptions. Inputs are computed in `dtype` and written in `out_dtype`; mergekit's rule applies if one is
    missing. All keys of mergekit work. Other keys and repeated keys are refused by name. Parameters of other methods,
    which mergekit ignores, are `unused` in the report. The file may have `random_seed`. The documents of a file are
    merged in order. Each except the last has a `name`, by which later documents use its result, which is not kept.

    Args:
        config_file: mergekit's YAML.
        folders: Name -> folder of the models that the file names; others are folders, relative to the current one.
            MODEL+ADAPTER names a LoRA adapter on a model.
        base: The model, by the file's name or its folder's last part, whose config, tokenizer and chat template the
            result has where the file states no others; base_model, or the first model, by default.
        engine: "mergekit", or "ours" for a linear merge with one weight per input: fp32 sums, one rounding, compared
            with the fp64 mean.
        seed: As in `merge_method`; the file's random_seed by default, else 0.
        allow_template_change, ...: As in `merge_method`.
    Returns:
        As `merge_method`, and `unused`, `name`, `chat_template`, `tokenizer`, `tokens_without_embedding` and
        `documents` (what the report of each earlier one says) where there are any; as
        `smolpost.merging.linear.merge` with engine "ours".
    Raises:
        UserError: The file, its models or parameters make no merge; nothing is written.
        OSError: The disk became full, among others; nothing is left behind.
    """
    check_choice("engine", engine, ENGINES)
    out, named = Path(out), {name: Path(folder) for name, folder in (folders or {}).items()}
    place = out.parent / f"{out.name}.documents"
    made = place.parent / f".{place.name}.making"
    *earlier, last = read_file(Path(config_file), named, lambda number: made / str(number))
    # Before the first of several merges is made.
    for document in (*earlier, last):
        check_config(document.config)
        _donor(document, base if document is last else None)
    check_out(out)
    options = {
        "engine": engine, "seed": seed, "allow_template_change": allow_template_change, "no_tokenizer": no_tokenizer,
        "threads": threads, "shard_bytes": shard_bytes,
    }  # fmt: skip
    if not earlier:
        return _merge_document(last, out, base, hash_weights=hash_weights, **options)
    with workplace(place):
        # Their files are hashed as the inputs that they are.
        reports = [
            _merge_document(document, made / str(number), None, hash_weights=False, **options)
            for number, document in enumerate(earlier)
        ]
        kept = ("name", "method", "base", "dtype", "seed", "config", "inputs")
        documents = [{key: value for key, value in report.items() if key in kept} for report in reports]
        return _merge_document(last, out, base, documents, hash_weights=hash_weights, **options)


def _merge_document(
    document: Document,
    out: Path,
    base: str | None,
    documents: list[dict[str, Any]] | None = None,
    *,
    engine: str,
    seed: int | None,
    allow_template_change: bool,
    no_tokenizer: bool,
    hash_weights: bool,
    threads: int | None,
    shard_bytes: int,
) -> dict[str, Any]:
    """One merge of a file; `documents` are the reports of those before it."""
    config, checkpoints = document.config, list(document.models.values())
    unused = check_config(config)
    base = _donor(document, base)
    dtype = config.get("out_dtype") or config.get("dtype") or _common_dtype(checkpoints)
    config["out_dtype"] = dtype
    asked = "tokenizer" if "tokenizer" in config else "chat_template" if document.chat_template else None
    if asked and (no_tokenizer or engine == "ours"):
        why = "the result has no tokenizer" if no_tokenizer else "engine='ours' keeps the base's tokenizer"
        raise UserError(f"{document.where} states {asked}, but {why}; drop one of them")
    if engine == "ours":
        for checkpoint in checkpoints:
            if checkpoint.adapts is not None:
                raise UserError(
                    f"{document.where}: engine='ours' puts the adapter of '{checkpoint.name}' on the model that its "
                    "own config names; take engine='mergekit', or name the adapter's folder alone"
                )
        weighted = [(n, document.models[n].folder, weight) for n, weight in _linear_weights(config).items()]
        return linear.merge(
            weighted, base, out, dtype, allow_template_change=allow_template_change, no_tokenizer=no_tokenizer,
            hash_weights=hash_weights, threads=threads, shard_bytes=shard_bytes,
        )  # fmt: skip
    vocabulary = "none" if no_tokenizer else "aligned" if "tokenizer" in config else "equal"
    # A template that the file states is the one of the result, whatever those of the inputs.
    any_template = allow_template_change or document.chat_template is not None
    job = Job(checkpoints, base, out, dtype, any_template, hash_weights, threads, vocabulary)
    seed = next(value for value in (seed, document.seed, 0) if value is not None)
    stated = {"name": document.name, "chat_template": document.chat_template, "documents": documents, "unused": unused}
    report = {key: value for key, value in stated.items() if value}
    return _merge(config, job, seed, shard_bytes, document.chat_template, report)


def _merge(
    config: dict[str, Any],
    job: Job,
    seed: int,
    shard_bytes: int,
    chat_template: str | None = None,
    stated: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A merge by a mergekit configuration that names the job's checkpoints; the report says also what is `stated`."""
    method = config["merge_method"]
    check_request(job.checkpoints, job.base, job.out, job.dtype)
    _check_folders(job.checkpoints)

    def write(full, donor, unfinished, finished) -> MethodResult:
        check_values(full, donor.tensors)
        with planned(config, full, donor) as plan:
            check_filters(config, plan.names)
            resolved = [_normalized(entry) for entry in plan.resolved] if method == "linear" else plan.resolved
            template = chat_template and template_text(chat_template, plan.references)
            mean.write_result(plan, unfinished, job.dtype, seed=seed, limit=shard_bytes, finished=finished)
        report = {"resolved": resolved if len(resolved) > 1 else [resolved[0] | {"tensors": "all"}]}
        if plan.vocabulary:
            report["tokenizer"] = config["tokenizer"].get("source", "union")
            report["tokens_without_embedding"] = without_embedding(plan, config)
        tokenizer = plan.vocabulary and plan.vocabulary[1].tokenizer
        return MethodResult(
            report, plan.shapes, plan.config, lambda folder: write_tokenizer(folder, tokenizer, template)
        )

    def verify(full, merged) -> dict[str, Any]:
        check_finite(merged)
        return {}

    own = {entry["model"]: entry.get("parameters") or {} for entry in entries(config) if "model" in entry}
    of_models = "slices" not in config and not any("slices" in part for part in config.get("modules", {}).values())
    report = {
        "method": method,
        "inputs": {c.name: own.get(c.name, {}) if of_models else {} for c in job.checkpoints},
        "base": job.base,
        "base_model": config.get("base_model"),
        "dtype": job.dtype,
        "compute_dtype": config.get("dtype"),
        "engine": "mergekit",
        "seed": seed if method in STOCHASTIC else None,
        "config": config,
        **(stated or {}),
    }
    return build(job, write, verify, report)


def _check_folders(checkpoints: list[Checkpoint]) -> None:
    """Refuse two names for one folder: mergekit counts a model once."""
    seen: dict[tuple[Path, Path | None], str] = {}
    for checkpoint in checkpoints:
        folder = checkpoint.folder.resolve()
        first = seen.setdefault((folder, checkpoint.adapts), checkpoint.name)
        if first != checkpoint.name:
            raise UserError(f"merge inputs '{first}' and '{checkpoint.name}' are the same folder, {folder}; drop one")


def _donor(document: Document, base: str | None) -> str:
    """The model whose config the result has, and whose tokenizer where the document asks for no other."""
    source = document.config.get("tokenizer", {}).get("source")
    if base is not None and source in document.models and source != base:
        raise UserError(
            f"{document.where} uses the tokenizer of '{source}', but base='{base}'; name one model for both"
        )
    if base not in (None, *document.models):
        raise UserError(f"{document.where}: base='{base}' is not one of its models {', '.join(document.models)}")
    first = next(entry["model"] for entry in entries(document.config) if "model" in entry)
    return base or document.config.get("base_model") or first


def _common_dtype(checkpoints: list[Checkpoint]) -> str:
    """The dtype that holds every input as it is stored, which mergekit computes and writes in."""
    models = [base_of(checkpoint) if is_adapter(checkpoint) else checkpoint for checkpoint in checkpoints]
    found = [{tensor.dtype for tensor in model.tensors.values()} for model in models]
    if any(len(own) != 1 or not own <= TORCH_DTYPES.keys() for own in found):
        stored = sorted(set().union(*found))
        raise UserError(f"merge inputs are stored in {', '.join(stored)}; name the result's out_dtype")
    common = reduce(torch.promote_types, [TORCH_DTYPES[own.pop()] for own in found])
    return str(common).removeprefix("torch.")


def _normalized(entry: dict[str, Any]) -> dict[str, Any]:
    """A linear method's resolved parameters with the weights that count, which sum to 1."""
    weights = {name: own["weight"] for name, own in entry["inputs"].items()}
    total, divided = sum(weights.values()), entry["parameters"]["normalize"]
    if not math.isfinite(total) or (abs(total) <= WEIGHT_TOLERANCE if divided else abs(total - 1) > WEIGHT_TOLERANCE):
        stated = ", ".join(f"{name}={weight:g}" for name, weight in weights.items())
        remedy = "they cannot be divided by it" if divided else "not 1; divide each by their sum, or set normalize"
        raise UserError(f"merge weights {stated} of tensor {entry['tensors'][0]} sum to {total:.9g}, {remedy}")
    return entry | {"normalized_weights": {n: weight / total if divided else weight for n, weight in weights.items()}}


def _linear_weights(config: dict[str, Any]) -> dict[str, float]:
    """Input -> weight of a linear configuration that our engine can compute."""
    check_config(config)
    shared = config.get("parameters") or {}
    weights = {
        entry["model"]: (entry.get("parameters") or {}).get("weight", shared.get("weight"))
        for entry in config.get("models", [])
    }
    plain = all(isinstance(weight, int | float) and not isinstance(weight, bool) for weight in weights.values())
    whole = config.get("base_model") in (None, *weights)
    if config["merge_method"] != "linear" or not weights or not plain or not whole:
        raise UserError(
            "merge engine='ours' computes a linear merge of models with one number as weight each; "
            "take engine='mergekit' for other methods, slices, gradients and filters"
        )
    entry = {"tensors": ["all"], "parameters": {"normalize": shared.get("normalize", True)}}
    return _normalized(entry | {"inputs": {n: {"weight": weight} for n, weight in weights.items()}})[
        "normalized_weights"
    ]
