"""What distilled images look like beside real ones, in a feature space."""
