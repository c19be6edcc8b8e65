"""fashion-dit: a class-conditional diffusion transformer, trained on Fashion-MNIST."""
