"""A checkpoint's weights in another folder, for readers that know fewer spellings than transformers 5."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from smolpost.files import write_json
from smolpost.merging.checkpoint import EMBEDDING, HEAD, Checkpoint


def place_weights(source: Path, folder: Path, *, link: bool) -> None:
    """Put the weight files of a checkpoint into a folder, as they are unless its head stands there for the embedding.

    transformers 5 finds a tied matrix under either of its names. vLLM, mlx-lm, llama.cpp and transformers 4 leave out
    the head of a tied model, and would have no embedding.

    Args:
        link: By links where nothing changes.
    Raises:
        UserError: The files are not there or cannot be read.
    """
    checkpoint = Checkpoint(source.name, source)
    alone = head_alone(checkpoint)
    for file in checkpoint.weight_files:
        if file == alone:
            tensors = load_file(file)
            tensors[EMBEDDING] = tensors.pop(HEAD)
            save_file(tensors, folder / file.name, metadata={"format": "pt"})
        elif link:
            (folder / file.name).symlink_to(file.resolve())
        else:
            shutil.copyfile(file, folder / file.name)
    for file in source.glob("*.safetensors.index.json"):
        index = json.loads(file.read_text(encoding="utf-8"))
        if alone:
            index["weight_map"][EMBEDDING] = index["weight_map"].pop(HEAD)
        write_json(folder / file.name, index)


def head_alone(checkpoint: Checkpoint) -> Path | None:
    """The file with the head of a tied model that is stored without its embedding; None for every other model."""
    tensors = checkpoint.tensors
    if not checkpoint.config.get("tie_word_embeddings") or EMBEDDING in tensors or HEAD not in tensors:
        return None
    return tensors[HEAD].file
