"""From files to prepared rows: sources, mixtures, synthetic tasks, packing, preparation, collation."""
