"""Running an artifact: numpy, pydantic and an engine, never torch."""
