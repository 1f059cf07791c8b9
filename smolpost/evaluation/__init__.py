"""What a checkpoint can do: held-out loss and answers in both modes, recall by context length."""
