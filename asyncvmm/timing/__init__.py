"""Host phases and the records derived from them. Names and meanings are an interface."""
