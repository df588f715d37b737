// Compiled with the flags setup.py gives to *_avx2.cpp.
#include "attention.inc"
