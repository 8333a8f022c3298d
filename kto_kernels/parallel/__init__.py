"""Losses over more than one device, on torch.distributed."""
