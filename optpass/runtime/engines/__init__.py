"""One module per kind of engine, found by its name and imported when an engine of the kind is opened."""
