"""What proves the kernels: the contract of each operator as data, the rule of equality, timing, Triton's interpreter."""
