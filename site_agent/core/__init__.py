"""The pure core: when a fragment is due, when to align, when to wait. No I/O, no clock; tensors in `alignment` only."""
