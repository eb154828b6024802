"""The recorded tensor: a tensor without memory that knows the tape it is on."""
