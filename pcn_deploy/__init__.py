"""Attention-augmented convolutional networks from checkpoint to proven TensorRT engine."""
