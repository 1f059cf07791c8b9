"""A first pipeline for a checkpoint and rows of the user's own: what they are, and the settings that follow."""
