// The kernels of one instruction set, as a table: what an instruction set's files define and dispatch.cpp picks from.
#pragma once
#include "di4c/api.h"

// One namespace per instruction set; each family's source is compiled once into each.
#define DI4C_DECLARE_ISA(isa)                                                    \
  namespace di4c::cpu::isa {                                                     \
  void random_bits(const RandomBitsArgs&, int threads);                          \
  void sample(const SampleArgs&, int threads);                                   \
  void sample_product(const ProductArgs&, int threads);                          \
  void reveal(const RevealArgs&, int threads);                                   \
  void mixture_positions(const MixtureArgs&, int threads);                       \
  void mixture_finish(const MixtureArgs&, int threads);                          \
  void mixture_backward(const MixtureBackwardArgs&, int threads);                \
  void row_loss(const RowLossArgs&, int threads);                                \
  void row_loss_backward(const RowLossBackwardArgs&, int threads);               \
  }

DI4C_DECLARE_ISA(baseline)
DI4C_DECLARE_ISA(avx2)
DI4C_DECLARE_ISA(avx512)
DI4C_DECLARE_ISA(neon)
