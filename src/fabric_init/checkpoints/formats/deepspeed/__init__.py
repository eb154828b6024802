"""Folders that DeepSpeed has saved: ZeRO-1, 2 and 3."""
