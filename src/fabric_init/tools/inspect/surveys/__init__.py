"""What ``inspect`` finds in each format without reading values."""
