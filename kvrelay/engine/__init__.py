"""Runs one model step: checkpoints, the decoder, the paged KV pool, the sampler; and a fake engine without a model."""
