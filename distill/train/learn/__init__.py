"""From rows to trained weights: the model with its objective, attention inside rows, the loss, the loop."""
