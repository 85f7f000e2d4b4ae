"""From Hydra's configuration to a run: schema, identity, objects, grids of runs."""
