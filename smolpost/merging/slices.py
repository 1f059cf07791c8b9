"""Layers that a merge omits, repeats or moves, and the fields of config.json for each layer of the result."""

from typing import Any

from smolpost.errors import UserError

# Fields with an entry for each layer; an entry moves with its layer.
PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types", "layers_block_type", "layer_rope_theta")
# Fields that make a layer depend on its number.
BY_NUMBER = ("scale_attn_by_inverse_layer_idx",)

Slice = list[tuple[str, int, int]]  # model, first layer, layer after the last, of each source


def check_ranges(slices: list[Slice], num_layers: int) -> None:
    """Refuse ranges outside a model's layers, and slices whose sources differ in length.

    Raises:
        UserError: Names the range, or the lengths.
    """
    for sources in slices:
        lengths = {last - first for _, first, last in sources}
        for model, first, last in sources:
            if not 0 <= first <= last <= num_layers or (first == last and num_layers):
                raise UserError(
                    f"merge slices: layer_range=[{first}, {last}] of '{model}' is not within its {num_layers} layers"
                )
        if len(lengths) > 1:
            raise UserError(
                f"merge slices: the sources of a slice have {' and '.join(map(str, sorted(lengths)))} layers; give "
                "all of them the same number"
            )


def layer_fields(slices: list[Slice], num_layers: int, key: str | None, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of the merge's configuration that replace the base's; empty if all layers keep their places.

    Args:
        slices: In the order in which their layers follow one another.
        num_layers: Of the base.
        key: The field that counts the layers; None if mergekit does not know it.
        config: The fields of the part of the base's configuration that the layers belong to.
    Raises:
        UserError: A field depends on the numbers of layers, or layers that differ in one are merged into one.
    """
    taken = [[(model, first + i) for model, first, _ in sources] for sources in slices for i in _layers(sources)]
    if len(taken) == num_layers and all(layer == i for i, sources in enumerate(taken) for _, layer in sources):
        return {}
    if key is None:
        raise UserError(
            "merge slices leave out, repeat or move layers of a part of the model whose config field for their number "
            "is not known; give slices that cover all its layers in order"
        )
    found: dict[str, Any] = {key: len(taken)}
    for name, value in config.items():
        if name in PER_LAYER and isinstance(value, list) and len(value) == num_layers:
            found[name] = [_common(name, value, sources, place) for place, sources in enumerate(taken)]
        elif (name in BY_NUMBER and value) or (isinstance(value, list) and value and "layer" in name):
            raise UserError(
                f"merge slices leave out, repeat or move layers, but {name}={value} goes by a layer's number; give "
                "slices that cover all layers in order"
            )
    return found


def _layers(sources: Slice) -> range:
    _, first, last = sources[0]
    return range(last - first)


def _common(name: str, values: list[Any], sources: list[tuple[str, int]], place: int) -> Any:
    found = {f"layer {layer} of '{model}'": values[layer] for model, layer in sources}
    first, *others = found.values()
    if any(value != first for value in others):
        stated = ", ".join(f"{value} in {layer}" for layer, value in found.items())
        raise UserError(f"merge slices: layer {place} is merged from layers that differ in {name} ({stated})")
    return first
