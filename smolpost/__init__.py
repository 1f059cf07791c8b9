"""smolpost: the SmolLM3 post-training recipe, executable and tested end to end."""

__version__ = "0.1.0"
