"""smolpost merge: checkpoints merged from the command line."""

import argparse
import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

from smolpost.errors import UserError

DTYPES, ENGINES, VERIFICATIONS = ("bfloat16", "float16", "float32"), ("ours", "mergekit"), ("sampled", "full")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that `merge_command` takes, under the same names."""
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for the result; it must be empty or not exist")
    parser.add_argument(
        "inputs",
        nargs="*",
        metavar="FOLDER=WEIGHT",
        help="checkpoint or LoRA adapter and its weight, e.g. 0.45 or 1/3; a linear merge's weights sum to 1. "
        "Methods without weights take FOLDER; --config takes NAME=FOLDER",
    )
    parser.add_argument(
        "--base", metavar="FOLDER", help="gives config, tokenizer and chat template; default: the first input"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the written weights; default bfloat16")
    parser.add_argument("--method", help="a mergekit method, e.g. slerp, ties, dare_ties, model_stock")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="settings",
        metavar="KEY=VALUE",
        help="a parameter of the method, e.g. t=0.4",
    )
    parser.add_argument(
        "--base-model", metavar="FOLDER", help="model that the method starts from; default: --base, if it needs one"
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="a mergekit YAML file instead of inputs and method")
    parser.add_argument("--engine", choices=ENGINES, help="for linear merges; default ours, with --config mergekit")
    parser.add_argument("--verify", choices=VERIFICATIONS, help="elements to recompute in fp64; default sampled")
    parser.add_argument("--allow-template-change", action="store_true", help="the inputs' chat templates may differ")
    parser.add_argument("--no-tokenizer", action="store_true", help="merge without tokenizers; the result has none")
    parser.add_argument("--seed", type=int, help="for methods that draw numbers; default 0, or a file's random_seed")
    parser.add_argument("--threads", type=int, help="default: all cores, at most eight")


def merge_command(
    out: Path,
    inputs: list[str],
    *,
    base: str | None = None,
    dtype: str | None = None,
    method: str | None = None,
    settings: list[str] | None = None,
    base_model: str | None = None,
    config: Path | None = None,
    engine: str | None = None,
    verify: str | None = None,
    allow_template_change: bool = False,
    no_tokenizer: bool = False,
    seed: int | None = None,
    threads: int | None = None,
) -> int:
    """Merge as the command line says and print what was done.

    Args:
        out, inputs, ...: As `add_arguments` describes them; None is not stated.
    Returns:
        Exit code 0.
    Raises:
        UserError: A word makes no sense, two options exclude each other, or the merge is refused.
        OSError: The disk became full, among others; nothing is left behind.
    """
    # Importing torch takes a second; `smolpost --help` does not need it.
    from smolpost.merging import linear
    from smolpost.merging.mergekit import methods

    common = {"allow_template_change": allow_template_change, "no_tokenizer": no_tokenizer, "threads": threads}
    if config is not None:
        _refuse("config", method=method, set=settings, dtype=dtype, base_model=base_model, verify=verify)
        if engine == "ours":
            _refuse("config and --engine=ours", seed=seed)
        folders = {name: Path(folder) for name, folder in map(_pair, inputs)}
        report = methods.merge_yaml(config, out, folders, base=base, engine=engine or "mergekit", seed=seed, **common)
    elif method is None:
        _refuse("a weighted mean (no --method)", set=settings, base_model=base_model, seed=seed)
        named = _named(inputs, [base])
        weighted = [(name, folder, _weight(name, weight)) for name, (folder, weight) in named.items()]
        report = linear.merge(
            weighted, _name(base, named), out, dtype or "bfloat16", engine=engine or "ours",
            verification=verify or "sampled", **common,
        )  # fmt: skip
    else:
        _refuse(f"method={method}", engine=engine, verify=verify)
        needs_start = methods.method_of(method).spec.contract.base == "required"
        named = _named(inputs, [base, base_model])
        donor = _name(base, named)
        start = _name(base_model, named) if base_model else donor if needs_start else None
        own = [(n, f, {} if w is None else {"weight": _weight(n, w)}) for n, (f, w) in named.items()]
        report = methods.merge_method(
            method, own, donor, out, dtype or "bfloat16", parameters=_parameters(settings or []), base_model=start,
            seed=seed or 0, **common,
        )  # fmt: skip
    print("\n".join(_lines(report, out)))
    return 0


def _refuse(what: str, **options: Any) -> None:
    """Refuse options that would have no effect beside another."""
    for name, value in options.items():
        if value not in (None, []):
            raise UserError(f"merge --{name.replace('_', '-')} has no effect with {what}; drop one of them")


def _pair(word: str) -> tuple[str, str]:
    name, mark, folder = word.partition("=")
    if not mark:
        raise UserError(f"merge input {word} with --config is not NAME=FOLDER, a model that the file names")
    return name, folder


def _named(words: list[str], others: list[str | None]) -> dict[str, tuple[Path, str | None]]:
    """Name -> folder and weight of the inputs, and of other folders that are none; named by the folder's last part."""
    stated = []
    for word in words:
        folder, mark, weight = word.rpartition("=")
        # A folder's own name may have a = in it.
        stated.append((Path(folder), weight) if mark and not Path(word).is_dir() else (Path(word), None))
    known = {folder.resolve() for folder, _ in stated}
    stated += [(Path(o), None) for o in dict.fromkeys(others) if o and Path(o).resolve() not in known]
    if not stated:
        raise UserError("merge has no inputs; name them as FOLDER=WEIGHT")
    named: dict[str, tuple[Path, str | None]] = {}
    for folder, weight in stated:
        last = Path(os.path.abspath(folder)).name
        name, number = last, 2
        while name in named:
            name, number = f"{last}-{number}", number + 1
        named[name] = (folder, weight)
    return named


def _name(folder: str | None, named: dict[str, tuple[Path, str | None]]) -> str:
    """The input's name; the first one where no folder is stated."""
    if folder is None:
        return next(iter(named))
    return next(name for name, (own, _) in named.items() if own.resolve() == Path(folder).resolve())


def _weight(name: str, text: str | None) -> float:
    if text is None:
        raise UserError(f"merge input '{name}' has no weight; state it as FOLDER=WEIGHT")
    try:
        return float(Fraction(text))
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"merge input '{name}': weight '{text}' is not a number such as 0.45 or 1/3") from error


def _parameters(settings: list[str]) -> dict[str, Any]:
    """KEY=VALUE with values as in JSON: a number, true, false, a list over the layers."""
    found = {}
    for setting in settings:
        key, mark, text = setting.partition("=")
        try:
            value = json.loads(text)
        except ValueError as error:
            raise UserError(f"merge --set {setting} is not KEY=VALUE with a number, true, false or a list") from error
        if not mark or key in found:
            raise UserError(f"merge --set {setting} states {key} twice, or is not KEY=VALUE; keep one")
        found[key] = value
    return found


def _lines(report: dict[str, Any], out: Path) -> list[str]:
    """What was merged, how each input counts, what it took and where it is."""
    normalized = [entry["normalized_weights"] for entry in report.get("resolved", []) if "normalized_weights" in entry]
    lines = [f"document   {made['name']}: {made['method']}, not kept" for made in report.get("documents", [])]
    lines.append(f"method     {report['method']}, by {'mergekit' if report['engine'] == 'mergekit' else 'smolpost'}")
    for name, own in report["inputs"].items():
        text = f"{own:.9g}" if isinstance(own, float | int) else json.dumps(own) if own else "no parameters"
        divided = f", counts as {normalized[0][name]:.9g}" if len(normalized) == 1 else ""
        lines.append(f"input      {name}: {text}{divided}")
    if len(report.get("resolved", [])) > 1:
        lines.append(f"parameters differ among {len(report['resolved'])} sets of tensors: `resolved` in the manifest")
    if report.get("base_model"):
        lines.append(f"from       {report['base_model']}")
    lines += [f"unused     {what}" for what in report.get("unused", [])]
    lines.append(f"base       {report['base']}: its {', '.join(report['donated'])}")
    if "tokenizer" in report:
        zeros = len(report["tokens_without_embedding"])
        lines.append(
            f"tokenizer  {report['tokenizer']}" + (f"; {zeros} tokens that no input has: zeros" if zeros else "")
        )
    if "chat_template" in report:
        lines.append(f"template   {report['chat_template'].splitlines()[0][:60]}")
    if report.get("seed") is not None:
        lines.append(f"seed       {report['seed']}")
    lines.append(
        f"written    {report['num_tensors']} tensors, {report['num_parameters']:,} parameters, {report['dtype']}"
    )
    if "correctly_rounded" in report:
        lines.append(
            f"checked    {report['num_compared']:,} elements in fp64: {report['correctly_rounded']:.4%} correctly "
            f"rounded, largest distance {report['max_abs_diff']:.2g}; loaded and run"
        )
    else:
        lines.append("checked    all elements finite; loaded and run")
    speed = (report["read_bytes"] + report["written_bytes"]) / 1e9 / report["seconds"]
    lines.append(f"took       {report['seconds']:.2f} s, {speed:.3g} GB/s read and written")
    return [*lines, f"folder     {out}"]
