"""Run recorded ops on real memory: whole, chunk by chunk, and with the random numbers that were recorded for them."""
