"""What proves the kernels: each operator's contract as data, the rule of equality, timing, Triton's interpreter."""
