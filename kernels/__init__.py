"""kernels of optpass; import as optpass.kernels."""
