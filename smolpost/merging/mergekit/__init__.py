"""mergekit's methods and YAML files behind our checks, and its linear engine."""
