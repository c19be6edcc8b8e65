"""fashion-world: a world model in small, which denoises the next frame of moving items and their depth."""
