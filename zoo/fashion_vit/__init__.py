"""fashion-vit: a vision transformer of 197 tokens, trained on Fashion-MNIST."""
