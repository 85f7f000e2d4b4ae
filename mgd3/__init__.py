"""Mode-guided dataset distillation (MGD3): a diffusion model steered to a class's modes."""
