"""Merges that are chosen by evaluating them: sweeps over one weight, and greedy soups."""
