"""A guest's network on the host: user-mode helpers, TAP interfaces, and the links that join them to a network card."""
