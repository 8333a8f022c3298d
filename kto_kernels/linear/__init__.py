"""From hidden states: the plan of the chunks of logits, and the walk over them."""
