"""A server under load: requests that arrive when they do and not when the server has time, and what became of each."""
