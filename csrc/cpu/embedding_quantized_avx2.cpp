// Compiled with the AVX2, FMA and F16C flags setup.py gives to *_avx2.cpp.
#include "embedding_quantized.inc"
