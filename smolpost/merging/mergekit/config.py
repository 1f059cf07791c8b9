"""What a mergekit configuration may say: methods, their parameters and dtypes, checked before anything is read."""

from collections.abc import Iterator
from typing import Any

from smolpost.errors import UserError
from smolpost.merging.mergekit.yaml_file import entries, reason
from smolpost.merging.preflight import BYTES

COMPUTE_DTYPES = (*BYTES, "float64")
STOCHASTIC = ("dare_linear", "dare_ties", "della", "della_linear", "arcee_fusion")
CONDITIONAL = {"value", "filter"}


def check_config(config: dict[str, Any]) -> list[str]:
    """Refuse a method mergekit does not have, parameters that no method or no value fits, dtypes that it cannot write.

    Returns:
        What to say of parameters that belong to other methods, which files keep from one to the next.
    """
    method = method_of(config["merge_method"])
    for key, known in (("dtype", COMPUTE_DTYPES), ("out_dtype", tuple(BYTES))):
        if config.get(key) not in (None, *known):
            raise UserError(f"merge {key}='{config[key]}' is not known; choose one of {', '.join(known)}")
    needs_base = method.spec.contract.base == "required"
    if needs_base and not any(entry.get("base_model") for entry in entries(config)):
        raise UserError(f"merge method {method.spec.name} needs base_model, the model that it starts from; name it")
    own = {p.name: p for p in method.spec.input_parameters}
    shared = {p.name: p for p in method.spec.shared_parameters}
    idle = _idle(method)
    unused = []
    for entry in entries(config):
        model = entry.get("model")
        known = own if model is not None else {**shared, **own}
        if model is not None and model == config.get("base_model"):
            known = {name: p for name, p in own.items() if p.scope == "input"}
        for name, value in (entry.get("parameters") or {}).items():
            of_model = f" of '{model}'" if model is not None else ""
            if name in known and name not in idle:
                _check_value(value, known[name], f"merge method {method.spec.name}: parameter {name}{of_model}")
            elif name in shared and model is not None:
                raise UserError(
                    f"merge method {method.spec.name}: parameter {name}{of_model} belongs to the whole merge, not to "
                    f"an input; it takes {', '.join(known) or 'none'} here"
                )
            elif name in _all_parameters():
                unused.append(f"parameter {name}{of_model}: {method.spec.name} does not look at it")
            else:
                raise UserError(
                    f"merge method {method.spec.name}: parameter {name}{of_model} is not used; it takes "
                    f"{', '.join(name for name in known if name not in idle) or 'none'} here"
                )
    return list(dict.fromkeys(unused))


def method_of(name: str):
    """mergekit's method of a name."""
    methods = {method.spec.name: method for method in _methods()}
    if name not in methods:
        raise UserError(f"merge method '{name}' is not one of mergekit's: {', '.join(sorted(methods))}")
    return methods[name]


def _methods() -> tuple[Any, ...]:
    from mergekit.merge_methods.registry import registered_methods

    return registered_methods()


def _all_parameters() -> set[str]:
    return {parameter.name for method in _methods() for parameter in method.spec.parameters}


def _idle(method: Any) -> set[str]:
    """Parameters that mergekit lists for a method and does not look at."""
    sparsifies = getattr(method, "sparsification_method", "not of these") is not None
    return set() if sparsifies else {"density", "rescale"}


def _check_value(value: Any, parameter: Any, where: str) -> None:
    """A scalar, a gradient (list of scalars over the layers), or conditional values of those."""
    conditional = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, dict)]
    if conditional:
        if isinstance(value, list) and len(conditional) != len(value):
            raise UserError(f"{where} mixes conditional values with others")
        for item in conditional:
            unknown = sorted(str(key) for key in item.keys() - CONDITIONAL)
            if unknown:
                raise UserError(f"{where}: key {unknown[0]} in a conditional value is not one of value, filter")
            _check_value(item.get("value"), parameter, where)
        return
    for scalar in value if isinstance(value, list) and value else [value]:
        try:
            parameter.validate(scalar)
        except ValueError as error:
            raise UserError(f"{where}={scalar!r} is not a value it can have ({reason(error)})") from error


def _conditions(config: dict[str, Any]) -> Iterator[str]:
    for entry in entries(config):
        for value in (entry.get("parameters") or {}).values():
            items = value if isinstance(value, list) else [value]
            yield from (item["filter"] for item in items if isinstance(item, dict) and item.get("filter"))


def check_filters(config: dict[str, Any], tensors: set[str]) -> None:
    """Refuse conditional values whose filter is in the name of no tensor that the architecture knows."""
    for text in sorted(set(_conditions(config)) - {"*"}):
        if not any(text in name for name in tensors):
            raise UserError(
                f"merge method {config['merge_method']}: filter '{text}' matches no tensor's name; correct or remove it"
            )
