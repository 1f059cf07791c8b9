"""A checkpoint that somebody has released, as a stage that others start from."""

import re
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from smolpost.errors import Wrong
from smolpost.files import MANIFEST, link
from smolpost.schema import MISSING
from smolpost.stages.base import Stage, Work, stage_kind

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


@stage_kind
@dataclass
class ReleasedStage(Stage):
    """The checkpoint's files, in a folder of the run. On the disk of the Hub's cache they take no further space.

    A stage that trains from it has to state the chat template that its tokenizer has, as for model.checkpoint.
    """

    kind: str = "released"
    checkpoint: str = MISSING  # Hub id, or a folder with a manifest
    revision: str | None = None  # Hub branch, tag or commit; null: main; a folder has none

    VERSION = 1
    MAKES_MODEL = True

    def checkpoints(self):
        return [("checkpoint", self.checkpoint, self.revision)]

    def check(self, key, recipe, place):
        if not _HUB_ID.fullmatch(self.checkpoint) and not (self.checkpoint and Path(self.checkpoint).is_dir()):
            raise Wrong(f"{key}.checkpoint", f"={self.checkpoint} is neither a folder nor a Hub id; name one of them")

    def keyed_fields(self):
        return {}  # the commit or the content counts, not its name

    def key_parts(self, keys, stage):
        return {"checkpoint": keys.checkpoint(f"stages.{stage.entry}.checkpoint", self.checkpoint, self.revision)}

    def make(self, work: Work):
        from smolpost.model.loading import FILES, check_usable

        source = work.checkpoints["checkpoint"]
        for file in sorted(source.iterdir()):
            wanted = any(fnmatch(file.name, pattern) for pattern in FILES)
            if wanted and file.is_file() and not file.name.startswith(".") and file.name != MANIFEST:
                link(file, work.folder / file.name)
        check_usable(work.folder)
        print(f"{source}: every weight of the model is there", flush=True)
        return {"source": str(source)}
