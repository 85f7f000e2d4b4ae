"""The reverse process (section 4.2): samplers, guidance terms, starts, noise streams."""
