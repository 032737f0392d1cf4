"""Programs that only have to type-check."""
