"""The verbs of the command line, a file for each: its arguments, and what it does with them.

A file has `add_arguments(parser)` and `command(options) -> exit code`. `smolpost.cli` imports the one that is called.
"""
