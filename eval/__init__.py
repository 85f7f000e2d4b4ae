"""Scoring a distilled dataset: train students from scratch on it, report their accuracy."""
