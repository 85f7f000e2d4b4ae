"""Pictures of results, as bytes."""
