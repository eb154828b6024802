"""The findings of an audit, one kind in each file."""
