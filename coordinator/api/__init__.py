"""The HTTP API: routes, bounds, authentication, errors; as thin as it can be."""
