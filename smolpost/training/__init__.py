"""Training on prepared rows: the same stage on one CPU core or on many GPUs."""
