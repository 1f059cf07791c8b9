"""Pipelines from the YAML files of other tools, with a list of what differs. One file per tool says what its keys mean.

Library knowledge is data: `trl_keys` and `axolotl_keys` name each key that the tools have.
"""
