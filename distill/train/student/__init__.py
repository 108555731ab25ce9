"""The student's model directory, in and out: weights, adapters, and the model card."""
