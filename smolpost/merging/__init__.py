"""Weighted means of checkpoints: a soup is the equal-weight one, a linear merge has stated weights.

`mergekit.merge` checks the inputs, has mergekit average them in one flat fp32 pass, and verifies every element.
"""
