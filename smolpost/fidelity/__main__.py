"""`python -m smolpost.fidelity docs/recipe.md` writes smollm3's table into the page."""

import sys
from pathlib import Path

from smolpost import recipe
from smolpost.fidelity.show import rewrite
from smolpost.fidelity.table import REFERENCE, sections

if __name__ == "__main__":
    rewrite(Path(sys.argv[1]), sections(recipe.load([f"pipeline={REFERENCE}"]).recipe))
