"""Data made by models: preference pairs of a stronger and a weaker checkpoint."""
