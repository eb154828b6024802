"""Where the bytes of a checkpoint come from: local files, HTTP, fsspec and the Hugging Face Hub."""
