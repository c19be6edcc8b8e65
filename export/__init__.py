"""export of optpass; import as optpass.export."""
