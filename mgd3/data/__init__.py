"""Real images and their classes; the distilled dataset, a folder."""
