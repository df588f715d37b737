// Compiled with the AVX-512 (F, BW, VL, DQ) flags setup.py gives to *_avx512.cpp.
#include "embedding_quantized.inc"
