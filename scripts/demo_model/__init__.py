"""The demo model: its language of facts, its tokenizer, its training and its check.

``facts`` and ``check`` need only what kvrelay itself needs; ``train`` needs PyTorch, which is a development tool here.
"""
