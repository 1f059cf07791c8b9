"""From a recipe to finished stages: plan, lineage, steps, run."""
