"""Weighted means of checkpoints: a soup is the equal-weight one, a linear merge has stated weights.

`linear.merge` checks the inputs, averages them in one flat fp32 pass over mapped files, and verifies what it wrote.
"""
