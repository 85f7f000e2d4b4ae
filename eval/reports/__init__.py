"""Pages and pictures: one run, one table of a paper."""
