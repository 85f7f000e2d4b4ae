"""Mode discovery (section 4.1): each class's latents, and K representative points of them."""
