"""What runs on GPUs: text encoding, FP8 denoising and VAE decoding."""
