"""The host's side of a guest's sockets: byte streams, listeners, and the unix sockets in front of them."""
