// Compiled with the flags setup.py gives to *_avx512.cpp.
#include "attention.inc"
