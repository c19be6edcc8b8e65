"""stdlib-lm: a small causal language model of Llama architecture, trained on Python's standard library."""
