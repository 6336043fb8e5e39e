"""What all kernels share: launches, streams, overlap."""
