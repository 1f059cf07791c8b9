"""The published recipe's values by source, beside those of a pipeline: `smolpost plan --fidelity`, docs/recipe.md."""
