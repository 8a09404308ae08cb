"""Photos to batches: reading and cropping, augmentation, prompts, class pictures, latents."""
