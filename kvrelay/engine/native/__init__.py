"""Kernels of our own in C++, compiled when the package is installed, and how Python calls them."""
