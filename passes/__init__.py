"""passes of optpass; import as optpass.passes."""
