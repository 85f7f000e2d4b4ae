"""Generative networks behind one Protocol: encode, predict noise, decode."""
