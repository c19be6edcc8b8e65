"""zoo of optpass; import as optpass.zoo."""
