"""Traces → rows of token ids on the disk, proved fit for training, and the batches that are made of them."""
