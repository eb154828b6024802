"""Files of ``torch.save``: zip archives and the format from before torch 1.6."""
