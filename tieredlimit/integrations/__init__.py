"""One module per neighbour, each with an extra of its own; nothing here is loaded unasked."""
