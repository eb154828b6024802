"""The tape: what is recorded, as plain data, and what can be asked of it without running anything."""
