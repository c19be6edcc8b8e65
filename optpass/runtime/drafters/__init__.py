"""One module per drafter, named as its class, found by its name and imported when one is made."""
