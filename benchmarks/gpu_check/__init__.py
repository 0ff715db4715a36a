"""The check of the torch engine on a GPU: correctness first, then measurements with their limits beside them."""
