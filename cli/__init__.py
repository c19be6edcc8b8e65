"""cli of optpass; import as optpass.cli."""
