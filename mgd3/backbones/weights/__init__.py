"""Where checkpoints come from, and how their tensors are named."""
