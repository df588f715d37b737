"""The ahead-of-time lint: every kernel compiled to machine code on a machine without a GPU, and held to rules.

    python -m pykernels.testing.aot                      # everything; non-zero exit on a broken rule or a regression
    python -m pykernels.testing.aot --only gelu --json rows.json
    python -m pykernels.testing.aot --update-baseline    # accept what the kernels are now

Triton kernels are compiled through their own wrappers under a fake driver (`dryrun`), CUDA C++ by nvcc (`cuda`). What
is compiled is data: `entries/<room>.py`. The rules are in `rules`, the figures behind them in `sass` and `roofline`.
The process must not interpret Triton: unset TRITON_INTERPRET.
"""
