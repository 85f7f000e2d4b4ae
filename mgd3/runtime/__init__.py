"""What every part stands on: errors, checks, signals, progress, compute, processes."""
