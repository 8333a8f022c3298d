"""The operators `torch.ops.kto_kernels.*`: from logits, and from hidden states."""
