"""Guidance terms of methods that came after mode guidance, one in each module."""
