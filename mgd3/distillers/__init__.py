"""Ways to make a distilled dataset: by generation or by selection."""
