"""What a start checkpoint is: its sizes, its tokenizer, its own chat template."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smolpost.chat.needed_tokens import lacking
from smolpost.chat.render import load_template
from smolpost.errors import UserError
from smolpost.files import MANIFEST
from smolpost.importing.template import marks_more, same_as, without_marks
from smolpost.pipeline import manifest
from smolpost.screen import command_line
from smolpost.training.memory import shape_of
from smolpost.training.settings import LoRA

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

OURS = ("smollm3", "smollm3_published", "chatml")


@dataclass(frozen=True)
class Checkpoint:
    """
    Attributes:
        place: The folder or Hub id, as the recipe names it.
        folder: Where its files lie.
        config: Of its text model, as in config.json.
        parameters: How many it has.
        context: Longest context in tokens, or None where the config does not say.
        tokenizer: With the model's own chat template, if it has one.
        unadopted: It is a folder without a manifest.
    """

    place: str
    folder: Path
    config: dict[str, Any]
    parameters: int
    context: int | None
    tokenizer: "PreTrainedTokenizerBase"
    unadopted: bool

    @property
    def model_type(self) -> str:
        return self.config.get("model_type", "")

    def takes_adapters(self, lora: LoRA) -> bool:
        """Whether it has the layers that the adapters are for."""
        from smolpost.model.stored import CONFIG, read_config
        from smolpost.training.adapters import check_targets

        try:
            check_targets("sft", read_config(self.folder / CONFIG), lora)
        except UserError:
            return False
        return True


def look(place: str) -> Checkpoint:
    """The checkpoint of a folder or Hub id. Of one on the Hub, all but the weights is fetched.

    Raises:
        UserError: It is not a checkpoint of a causal LM, its weights are not all there, or it has no tokenizer.
    """
    from smolpost.model.loading import local_folder
    from smolpost.model.stored import CONFIG, read_config, stored_tensors

    if Path(place).is_file():
        raise UserError(f"--checkpoint {place} is a file; name the folder of a checkpoint, or a Hub id")
    if not Path(place).is_dir() and (place.startswith((".", "/", "~")) or place.count("/") > 1):
        raise UserError(f"--checkpoint {place} is not a folder; name the folder of a checkpoint, or a Hub id")
    who, is_local = f"--checkpoint {place}", Path(place).is_dir()
    folder = local_folder(place, key="--checkpoint", weights=False)
    config = read_config(folder / CONFIG, who).get_text_config().to_dict()
    shape = shape_of(config, compiled=False)
    if is_local:
        parameters = sum(tensor.num_elements for tensor in stored_tensors(folder, who).values())
    elif shape is not None:
        parameters = shape.parameters
    else:
        raise UserError(f"{who}: its size is not known before its weights are here; fetch it, and name its folder")
    return Checkpoint(
        place=place,
        folder=folder,
        config=config,
        parameters=parameters,
        context=config.get("max_position_embeddings") or config.get("n_positions"),
        tokenizer=_tokenizer(folder, who),
        unadopted=is_local and manifest.read(folder) is None,
    )


def _tokenizer(folder: Path, who: str) -> "PreTrainedTokenizerBase":
    from transformers import AutoTokenizer

    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{who} has no tokenizer.json; save the tokenizer beside the weights")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a broken file raises whatever its reader does
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{who}: its tokenizer cannot be loaded ({reason}); save it again") from error


@dataclass(frozen=True)
class Template:
    """The chat template of the pipeline's stages.

    Attributes:
        name: One of ours, or None: `text` becomes a file beside the pipeline.
        text: Of the template.
        why: The reason, for the report and the pipeline file.
        changes: Whether its text differs from that of the checkpoint's own template.
    """

    name: str | None
    text: str
    why: str
    changes: bool = False


def choose_template(checkpoint: Checkpoint, needs: str | None) -> Template:
    """The checkpoint's own template where it has one, otherwise one of ours.

    Args:
        needs: What in the rows needs more than plain ChatML, e.g. "tools"; None: nothing.
    Raises:
        UserError: The tokenizer lacks tokens that our template writes.
    """
    tokenizer = checkpoint.tokenizer
    if tokenizer.chat_template:
        return _own(tokenizer.get_chat_template())
    if checkpoint.model_type == "smollm3":
        name, why = "smollm3", "the recipe's template, as this SmolLM3 has none"
    elif needs:
        why = f"the checkpoint has no template, and the rows have {needs}; without a system text it names SmolLM"
        name = "smollm3"
    else:
        name, why = "chatml", "the checkpoint has no template, and the rows need neither modes nor tools"
    template = Template(name, load_template(name), why)
    if missing := lacking(tokenizer, template.text):
        command = command_line(["smolpost", "add-tokens", checkpoint.place, "OUT", "--template", name])
        raise UserError(
            f"--checkpoint {checkpoint.place} has no chat template, and no token for {', '.join(missing)}, which the "
            f"template {name} writes; `{command}` writes a checkpoint that has them; then take --checkpoint OUT"
        )
    return template


def _own(text: str) -> Template:
    same = next((name for name in OURS if load_template(name) == text), None)
    if same:
        return Template(same, text, "the checkpoint's own, one of ours")
    if same := same_as(text):
        return Template(same, load_template(same), "renders like the checkpoint's own", changes=True)
    if marks_more(text):
        why = "the checkpoint's own, without its {% generation %} marks, which hold more than replies"
        return Template(None, without_marks(text), why, changes=True)
    return Template(None, text, "the checkpoint's own")


def adopt(checkpoint: Checkpoint) -> None:
    """Give the folder a manifest, as `smolpost adopt` does.

    Raises:
        UserError: The checkpoint does not load completely, or the folder takes no file.
    """
    from smolpost.pipeline import steps

    try:
        steps.adopt(Path(checkpoint.place))
    except OSError as error:
        raise UserError(
            f"--checkpoint {checkpoint.place} needs a {MANIFEST}, which cannot be written there ({error.strerror}); "
            "name a folder of yours with links to its files"
        ) from None
