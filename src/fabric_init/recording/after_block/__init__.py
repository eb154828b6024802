"""What a recorded tensor answers, takes and refuses when no block is open."""
