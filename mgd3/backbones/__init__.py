"""Diffusion models behind one Protocol: encode, predict noise, decode."""
