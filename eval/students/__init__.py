"""Networks that are trained from scratch on a distilled dataset."""
