"""mergekit's planner on our checkpoints: what it computes for each tensor, and what config.json must say.

mergekit leaves some choices to chance: the donor without a stated base, and the order in which tokens are united. Here
they follow the order of the inputs. Tensors that mergekit would leave out silently are refused.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smolpost.errors import UserError
from smolpost.merging.checkpoint import Checkpoint
from smolpost.merging.mergekit.yaml_file import reason, with_models
from smolpost.merging.slices import check_ranges, layer_fields
from smolpost.model.stored import read_config

# What mergekit raises where a merge cannot be made.
REFUSALS = (RuntimeError, ValueError, KeyError, AssertionError, NotImplementedError, TypeError)


@dataclass(frozen=True)
class Plan:
    """What mergekit will compute.

    Attributes:
        tasks: Tensor -> the task of mergekit's graph that computes it.
        shapes: Tensor -> its shape.
        names: Of all tensors that mergekit knows of the architecture, stored or not.
        resolved: For each set of tensors that share them: `tensors` (names), `parameters` (name -> value) and
            `inputs` (input -> parameter -> value), with mergekit's defaults filled in, gradients and filters applied.
        config: Dotted key of config.json -> value that replaces the base's.
        references: mergekit's references to the models, the base's first.
        vocabulary: The task that makes the tokenizer, and its result (`tokenizer`, `permutations`); None if the
            configuration does not ask for a tokenizer.
    """

    tasks: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]
    names: set[str]
    resolved: list[dict[str, Any]]
    config: dict[str, Any]
    references: list[Any]
    vocabulary: tuple[Any, Any] | None


@contextmanager
def planned(config: dict[str, Any], checkpoints: list[Checkpoint], base: Checkpoint) -> Iterator[Plan]:
    """mergekit's plan for a configuration that names checkpoints; its tasks run inside the block.

    Args:
        config: As in a mergekit file, with names of `checkpoints` for models; not changed.
        base: Whose configuration the result has.
    Raises:
        UserError: mergekit refuses the configuration, or would leave out a part of the model.
    """
    # Importing mergekit takes seconds; only a merge pays for it.
    from mergekit.architecture import get_architecture_info
    from mergekit.common import set_config_value
    from mergekit.io.tasks import LoaderCache, SaveTensor
    from mergekit.options import MergeOptions
    from mergekit.plan import MergePlanner

    for checkpoint in (*checkpoints, base):
        if checkpoint.renamed:
            raise UserError(
                f"{checkpoint.who}: mergekit does not know tensor {min(checkpoint.renamed)} ({checkpoint.folder}); "
                f"give it plain names first: smolpost merge OUT {checkpoint.folder}=1"
            )
    inputs = _Inputs(checkpoints, base)
    with _without_warnings(), _without_memory():
        options = MergeOptions()
        LoaderCache().setup(options)
        with in_users_words(f"merge method {config['merge_method']}: mergekit refuses it"):
            stated = inputs.configuration(config)
            architecture = get_architecture_info(stated, options)
            own = inputs.base.config()
            planner = MergePlanner(stated, architecture, options, own)
            planner.normalize_config()
            changes, counts = _layers(config, planner, own, inputs)
            for key, value in counts.items():
                set_config_value(own, key, value)
            # Nothing is written before a task runs. (`plan_in_memory` raises in mergekit 0.1.5.)
            saved = [task for task in planner.plan_to_disk(out_path="") if isinstance(task, SaveTensor)]
            tasks = {task.tensor_name: task.tensor_task for task in saved if inputs.hold(task.tensor_task)}
            shapes = {name: inputs.shape(task) for name, task in tasks.items()}
            if not changes:
                inputs.check_read(tasks, options)
            vocabulary = None
            if planner._tokenizer_task:
                vocabulary = (planner._tokenizer_task, planner._tokenizer_task.execute())
                rows = _rows(stated, vocabulary[1], inputs)
                changes["vocab_size" if "vocab_size" in base.config else "text_config.vocab_size"] = rows
                for name, task in tasks.items():
                    axis = task.output_weight.vocabulary_axis
                    if axis is not None:
                        shapes[name] = (*shapes[name][:axis], rows, *shapes[name][axis + 1 :])
            names = {weight.name for weight in architecture.all_weights(own)} | tasks.keys()
        resolved = _resolved(tasks, inputs.names)
        yield Plan(tasks, shapes, names, resolved, changes, stated.referenced_models(), vocabulary)


class _Inputs:
    """Checkpoints under mergekit's references, the base first.

    Attributes:
        base: Its reference.
        names: Reference -> name.
    """

    def __init__(self, checkpoints: list[Checkpoint], base: Checkpoint):
        self._references = _references([base, *checkpoints])
        self._checkpoints = {self._references[c.name]: c for c in (*checkpoints, base)}
        self.base = self._references[base.name]
        self.names = {reference: name for name, reference in self._references.items()}

    def configuration(self, config: dict[str, Any]):
        """mergekit's object for a configuration."""
        from mergekit import config as of_mergekit

        order = list(self._references.values())

        class MergeConfiguration(of_mergekit.MergeConfiguration):  # pydantic's errors say its name
            def referenced_models(self):
                # mergekit's own order is that of a set of hashes, another in every process.
                return sorted(super().referenced_models(), key=order.index)

        return MergeConfiguration.model_validate(with_models(config, self._references.__getitem__))

    def hold(self, task: Any) -> bool:
        """Whether a planned tensor is stored: a head that is stored though tied is the embedding again."""
        if not task.output_weight.optional:
            return True
        named = [(self._checkpoints[model], weight) for model, weight in _read(task)]
        return any(name in c.tensors for c, weight in named for name in (weight.name, *(weight.aliases or ())))

    def _stored(self, model: Any, weight: Any) -> str | None:
        """The name under which mergekit finds a tensor in a model's files."""
        names = (weight.name, *(weight.aliases or ()), *(weight.tied_names or ()))
        return next((name for name in names if name in self._checkpoints[model].tensors), None)

    def shape(self, task: Any) -> tuple[int, ...]:
        """Shape of the tensor that a task computes, with the first input's number of tokens."""
        for model, weight in _read(task):
            name = self._stored(model, weight)
            if name:
                return self._checkpoints[model].tensors[name].shape
        # A tensor that is made of several stored ones, such as the experts of a mixture.
        load = next(iter(_gather(task).arguments().values()))
        return tuple(load.execute().shape)

    def check_read(self, tasks: dict[str, Any], options: Any) -> None:
        """Refuse a plan that leaves out a stored tensor which the model has.

        Args:
            options: mergekit's.
        """
        from mergekit.architecture.auto import get_transformers_info

        read = {self._stored(model, weight) for task in tasks.values() for model, weight in _read(task)}
        base = self._checkpoints[self.base]
        left_out = base.tensors.keys() - read
        if None in read or not left_out:  # None: made of several stored ones
            return
        *_, known = get_transformers_info(self.base, options)
        lost = sorted(left_out & set(known or ()))
        if lost:
            raise UserError(
                f"merge input '{base.name}': mergekit's description of {base.config['architectures'][0]} leaves out "
                f"tensor {lost[0]} ({len(lost)} such), so the result would not "
                "load completely; merge it without mergekit "
                "(a linear merge), or use a mergekit that knows the tensor"
            )


def _gather(task: Any) -> Any:
    """The task that loads the inputs of a tensor's task."""
    return getattr(task.gather_tensors, "gather_tensors", task.gather_tensors)


def _read(task: Any) -> list[tuple[Any, Any]]:
    """Model and weight of each input of a tensor's task, in the order of the inputs."""
    weights = dict(_gather(task).weight_info.items())
    return [(model, weights[model]) for model in task.model_order]


def _layers(config: dict[str, Any], planner: Any, own: Any, inputs: _Inputs) -> tuple[dict[str, Any], dict[str, int]]:
    """What config.json says of layers in place of the base's, and of that their number alone.

    Args:
        own: The base's configuration, an object of transformers'.
    """
    changes, counts, all_layers = {}, {}, []
    for name, module in planner.config.modules.items():
        architecture = planner.arch_info.modules[name].architecture
        number = architecture.num_layers(own)
        all_layers.append([0, number])
        slices = [[(inputs.names[s.model], *s.layer_range) for s in piece.sources] for piece in module.slices]
        check_ranges(slices, number)
        key = architecture.num_layers_config_key()
        if key is None and len(planner.config.modules) == 1:
            key = own.attribute_map.get("num_hidden_layers", "num_hidden_layers")
        part, _, last = (key or "").rpartition(".")
        fields = own.to_dict()
        for step in part.split(".") if part else ():
            fields = fields[step]
        found = layer_fields(slices, number, last or None, fields)
        prefix = f"{part}." if part else ""
        changes |= {prefix + field: value for field, value in found.items()}
        counts |= {prefix + field: value for field, value in found.items() if field == last}
    for part in (config, *config.get("modules", {}).values()):
        for entry in part.get("models") or []:
            if entry.get("layer_range") not in (None, *all_layers):
                raise UserError(
                    f"merge models: mergekit does not look at layer_range={entry['layer_range']} of "
                    f"'{entry['model']}' under models; write slices"
                )
    return changes, counts


def _rows(stated: Any, made: Any, inputs: _Inputs) -> int:
    """Rows of the embeddings that a tokenizer asks for.

    Args:
        stated: mergekit's configuration.
        made: What its tokenizer task returned.
    Raises:
        UserError: A token's row is beyond an input's embedding.
    """
    vocabulary = made.tokenizer.get_vocab()
    for model, rows in made.permutations.items():
        beyond = sorted(token for token, place in vocabulary.items() if place not in rows)
        if beyond:
            raise UserError(
                f"merge input '{inputs.names[model]}': its tokenizer has token {beyond[0]!r} beyond its last embedding "
                "row, and mergekit cannot align it; name another tokenizer source"
            )
    multiple = stated.tokenizer.pad_to_multiple_of or 1
    return -(-len(vocabulary) // multiple) * multiple


def without_embedding(plan: Plan, stated: dict[str, Any]) -> list[str]:
    """Tokens that no input has and the configuration says nothing of: mergekit gives them a row of zeros."""
    if plan.vocabulary is None:
        return []
    _, made = plan.vocabulary
    named = (stated.get("tokenizer") or {}).get("tokens") or {}
    return sorted(
        token
        for token, place in made.tokenizer.get_vocab().items()
        if token not in named and all(rows[place] < 0 for rows in made.permutations.values())
    )


def _references(checkpoints: list[Checkpoint]) -> dict[str, Any]:
    """mergekit's reference to each checkpoint, by name.

    Not ModelReference.parse, which takes + and @ in a path for an adapter and a revision.
    """
    from mergekit.common import ModelPath, ModelReference

    class Folder(ModelReference, frozen=True):
        config_file: str
        place: int

        def __hash__(self) -> int:
            # mergekit's maps go by hashes; those of texts are others in every process, and so would be its sums.
            return self.place

        def config(self, trust_remote_code: bool = False):
            # A model that an adapter was merged into keeps its config under a name that loaders do not see.
            return read_config(Path(self.model.path) / self.config_file)

    return {
        checkpoint.name: Folder(
            model=ModelPath(path=str(checkpoint.folder.resolve())), config_file=checkpoint.config_file, place=place
        )
        for place, checkpoint in enumerate(checkpoints)
    }


def _resolved(tasks: dict[str, Any], names: dict) -> list[dict[str, Any]]:
    # mergekit's maps and sets have another order in every process.
    found = {}
    for name in sorted(tasks):
        own = {names[model]: dict(sorted(values.items())) for model, values in tasks[name].input_parameters.items()}
        values = {
            "parameters": dict(sorted(tasks[name].parameters.items())),
            "inputs": {known: own[known] for known in names.values() if known in own},
        }
        found.setdefault(json.dumps(values), {"tensors": [], **values})["tensors"].append(name)
    return list(found.values())


@contextmanager
def in_users_words(what: str) -> Iterator[None]:
    """Turn mergekit's refusal into ours."""
    try:
        yield
    except REFUSALS as error:
        raise UserError(f"{what} ({reason(error)})") from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Keep mergekit's progress bar and errors, and drop its long warnings that it has no file for SmolLM3."""
    root, previous = logging.getLogger(), logging.root.manager.disable
    # mergekit warns on the root logger, which would install a handler for the process if it has none.
    handler = logging.NullHandler()
    root.addHandler(handler)
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)
        root.removeHandler(handler)


@contextmanager
def _without_memory() -> Iterator[None]:
    """Drop what mergekit caches per path for the life of the process: a later merge may find other weights there."""
    from mergekit.architecture.auto import infer_architecture_info
    from mergekit.io.tasks import LoaderCache

    try:
        yield
    finally:
        LoaderCache().loaders.clear()
        infer_architecture_info.cache_clear()
