"""Finished stages for others: what of a folder is published, its card, and the places that take it."""
