"""Mode-guided dataset distillation (MGD3): a diffusion model steered to a class's modes.

Shape letters: N real images, K modes of a class, B a batch, (C, h, w) a latent, (H, W) pixels.

images    (B, 3, H, W) float32 in [-1, 1]
latents   (B, C, h, w) what the diffusion model sees, always scaled; of a pixel-space backbone,
          the pixels
x_t       noisy latents; x0_hat what the network restores from them; eps the noise
t         a training timestep, 0 to 999; step: a sampling step, from num_steps - 1 down to 0
wnid      a class's key: its ImageNet synset, or its folder's name
label     the class's position in its dataset, the student's target
class id  the class's row among what the backbone is conditioned on: labels or encoded prompts
identity  the values that make a set or a score, from which its folder is named
"""
