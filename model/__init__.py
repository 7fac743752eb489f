"""Networks on tileconv's kernels, and the photographs to run them on."""
