"""Tools of all kernels: registering operators with torch, launching, block sizes, streams."""
