"""What survives: the journal, content-addressed blobs, checkpoints, and recovery from them."""
