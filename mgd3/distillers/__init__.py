"""What makes a distilled dataset: generation, candidate pools, real images, coresets, matching."""
