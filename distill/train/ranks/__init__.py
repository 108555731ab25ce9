"""The processes that train together: how they start, how the model is laid out over them, what they save."""
