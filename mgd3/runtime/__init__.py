"""What every part stands on: errors, checks, files, the cache, progress, compute, processes."""
