"""What is done to a backbone before it generates, and training a small one from scratch."""
