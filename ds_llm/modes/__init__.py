"""One file per training mode: how its model, data and loss are built."""
