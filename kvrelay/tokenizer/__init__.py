"""A checkpoint's tokenizer as its files describe it, for the router and for nodes."""
