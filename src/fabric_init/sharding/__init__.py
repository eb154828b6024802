"""Models that torch has sharded while they were recorded: which part of which tensor each rank keeps."""
