"""Talking to models at a terminal or through a pipe."""
