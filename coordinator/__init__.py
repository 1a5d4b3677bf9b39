"""The Isthmus coordinator: collects contributions, steps the masters, publishes versions."""
